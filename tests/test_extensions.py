"""Entry points of packages as they are installed."""

import pytest

from streamconv import extensions


@pytest.mark.parametrize("folder", ["added-1.0.dist-info", "added.egg-info"])
def test_entry_points_of_an_installed_package_are_found(tmp_path, monkeypatch, folder):
    info = tmp_path / folder
    info.mkdir()
    (info / ("METADATA" if folder.endswith("dist-info") else "PKG-INFO")).write_text("Metadata-Version: 2.1\nName: added\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[streamconv.toys]\nbear = json:dumps\n")
    assert not list(extensions.extensions("streamconv.toys"))
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = extensions.extensions("streamconv.toys")
    assert found.name == "bear"
    assert found.load()([1]) == "[1]"
    assert found.origin == "entry point json:dumps of group streamconv.toys"
    assert not list(extensions.extensions("streamconv.others"))
