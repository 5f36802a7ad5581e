import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tasks.encode import BACKENDS, STAGE, EncodeConfig, Manifests
from tasks.frame import ImageFile, hash_file
from tasks.stage import ItemError, Outputs


def encode(path: Path) -> Outputs | ItemError:
    (result,) = STAGE.run(Manifests(), EncodeConfig(), [{"image": ImageFile(str(path), hash_file(str(path))), "crop_to_frame": np.eye(3)}])
    return result


def refusal(path: Path) -> str:
    result = encode(path)
    assert isinstance(result, ItemError)
    assert path.name in str(result) or "people.parquet" in str(result)
    assert "--stage swap=composite" in str(result)
    return str(result)


@pytest.fixture
def person(people_folder: Path, tmp_path: Path) -> Path:
    """The second person with the manifest in the folder above, free to be damaged."""
    (tmp_path / "people").mkdir()
    shutil.copy(people_folder / "people.parquet", tmp_path)
    return Path(shutil.copy(people_folder / "people/000001.png", tmp_path / "people"))


def test_codes_are_the_manifests(person: Path) -> None:
    outputs = encode(person)
    assert not isinstance(outputs, ItemError)
    assert set(outputs) == set(STAGE.writes)
    codes = outputs["codes"]
    assert (codes.shape, codes.dtype) == ((12, 23, 512), np.float16)
    w = np.float32(pq.read_table(person.parents[1] / "people.parquet")["w"][1].as_py())
    np.testing.assert_array_equal(codes[11, 22], w.astype(np.float16))
    assert (codes == codes[0, 0]).all()
    assert BACKENDS == {"synth": STAGE}


def test_manifest_beside_the_picture(person: Path) -> None:
    shutil.move(person, person.parents[1])
    assert not isinstance(encode(person.parents[1] / person.name), ItemError)


def test_a_picture_of_someone_real(person: Path) -> None:
    with Image.open(person) as image:
        image.save(person)  # loses the text
    assert "is no synthetic person" in refusal(person)


def test_another_generator(person: Path) -> None:
    text = PngInfo()
    with Image.open(person) as image:
        for key, value in (image.text | {"e4s:generator": "0" * 64}).items():  # type: ignore[attr-defined]
            text.add_text(key, value)
        image.save(person, pnginfo=text)
    assert "another generator" in refusal(person)


def test_without_the_manifest(person: Path) -> None:
    (person.parents[1] / "people.parquet").unlink()
    assert "no people.parquet in its folder or the one above" in refusal(person)


def test_a_manifest_of_other_people(person: Path) -> None:
    manifest = person.parents[1] / "people.parquet"
    pq.write_table(pq.read_table(manifest).slice(2), manifest)
    assert "is not in" in refusal(person)


def test_a_damaged_code(person: Path) -> None:
    manifest = person.parents[1] / "people.parquet"
    table = pq.read_table(manifest)
    w = np.array(table["w"].to_pylist(), np.float32)
    w[1, 100] += 1e-6
    table = table.set_column(table.schema.get_field_index("w"), table.schema.field("w"), pa.array(list(w), pa.list_(pa.float32(), 512)))
    pq.write_table(table, manifest)
    assert "is damaged" in refusal(person)


def test_a_manifest_that_is_no_parquet(person: Path) -> None:
    (person.parents[1] / "people.parquet").write_text("seed,w")
    assert "cannot be read" in refusal(person)


def test_a_shrunk_person(person: Path) -> None:
    text = PngInfo()
    with Image.open(person) as image:
        for key, value in image.text.items():  # type: ignore[attr-defined]
            text.add_text(key, value)
        image.resize((512, 512)).save(person, pnginfo=text)
    assert "is 512 x 512 px, the generator makes 1024 x 1024" in refusal(person)
