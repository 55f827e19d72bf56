"""What is measured and how: arms, tasks, sweeps and cells, quality, time, memory and arithmetic, the records they end in."""
