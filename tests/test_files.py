import pytest

from attncap.errors import UserError
from attncap.files import atomic_file, write_atomically


def test_text_and_bytes(tmp_path):
    write_atomically(tmp_path / "a" / "b.txt", "Bär\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"B\xc3\xa4r\n"
    write_atomically(str(tmp_path / "c.bin"), b"\x00\xff")
    assert (tmp_path / "c.bin").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        write_atomically(tmp_path / "file" / "x.json", "")
    assert str(caught.value) == f"cannot write {tmp_path / 'file' / 'x.json'}: {tmp_path / 'file'} is not a folder"
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write .*folder: Is a directory"):
        write_atomically(tmp_path / "folder", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
