import pytest

from accel_tools.measure.growth import synthetic


@pytest.fixture
def toy(tmp_path):
    """Root of a sound made-up catalogue: method_1, method_2, method_3 with modules and tests."""
    root = tmp_path / "toy"
    synthetic(3, root)
    return root


@pytest.fixture
def edit(toy):
    """edit(path, old, new): replaces text that must be there; returns the line of the replacement, from 1."""
    def replace(path: str, old: str, new: str) -> int:
        file = toy / path
        text = file.read_text()
        assert old in text, f"{old!r} is not in {path}"
        file.write_text(text.replace(old, new, 1))
        return text[: text.index(old)].count("\n") + 1
    return replace
