"""How the bundled models are trained: data, recipes, pictures of what they draw."""
