import pytest


@pytest.fixture
def tmp_path(tmp_path):
    """A folder with no others beside it: these are searched for the images and lists of a file that is given."""
    (tmp_path / "alone").mkdir()
    return tmp_path / "alone"
