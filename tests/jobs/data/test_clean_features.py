"""`qformer features --clean`: what no run refers to goes, when confirmed; whatever else there is stays."""

import os

import pytest
import yaml

from jobs.cli import main as cli
from jobs.data.clean_features import CleanFeaturesSettings, main
from pipelines.data.features.spec import FeatureSpec, write_spec
from pipelines.data.media.frame_sampling import Sampling
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing

DAY_S = 86_400
SPEC = FeatureSpec(
    vision="vit",
    weights="0",
    layer=-2,
    precision="fp32",
    preprocessing=Preprocessing(
        height=32, width=32, resize_short_side=32, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    ),
    num_frames=4,
    sampling=Sampling(),
    num_tokens=3,
    width=2,
    dtype="fp16",
)


def _cache(folder, age_days=3, extra=()):
    write_spec(str(folder), SPEC)
    (folder / "settings.yaml").write_text("output: here")
    for name in (
        "summary.json",
        "quarantine.parquet",
        "shard-00000000.arrow",
        "shard-00000000.parquet",
        "shard-00000001.arrow.0123abcd.tmp",
    ):
        (folder / name).write_bytes(b"x" * 100)
    for name in extra:
        (folder / name).write_bytes(b"x" * 100)
    for path in folder.iterdir():
        changed_s = path.stat().st_mtime - age_days * DAY_S
        os.utime(path, (changed_s, changed_s))
    return folder


def _run(folder, features):
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump({"data": {"manifest": "m", "features": features}}))


def _settings(root, **changes):
    return CleanFeaturesSettings.model_validate({"caches": str(root), "runs": [str(root)], **changes})


@pytest.fixture
def world(tmp_path):
    """One cache for each reason to stay, and one without any."""
    _run(tmp_path / "runs" / "one", str(_cache(tmp_path / "used")))
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    _run(tmp_path / "runs" / "two", str(tmp_path / "link"))
    _cache(tmp_path / "linked")
    _cache(tmp_path / "fresh", age_days=0)
    _cache(tmp_path / "foreign", extra=["notes.txt"])
    _cache(tmp_path / "deep" / "unused")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "shard-00000000.arrow").write_bytes(b"no spec beside it")
    broken = _cache(tmp_path / "broken")
    (broken / "features.json").write_text('{"format_version": 99}')
    return tmp_path


def _tree(root):
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_nothing_goes_without_confirmation(world, capsys):
    before = _tree(world)
    told = main(_settings(world))
    assert told["removable"] == [str(world / "deep/unused")]
    assert _tree(world) == before
    printed = capsys.readouterr().out
    assert f"unused  {world}/deep/unused: " in printed and "add --set confirm=true" in printed


def test_only_what_nothing_refers_to_goes(world, capsys):
    before = _tree(world)
    told = main(_settings(world, confirm=True))
    assert told["removed"] == [str(world / "deep/unused")]
    assert {path.rpartition("/")[2] for path in told["kept"]} == {"used", "linked", "fresh", "foreign", "broken"}
    gone = before - _tree(world)
    assert gone and all(path.startswith("deep/unused") for path in gone)
    assert (world / "deep").is_dir() and not (world / "deep/unused").exists()
    lines = {line.split(":")[0].rpartition("/")[2]: line for line in capsys.readouterr().out.splitlines()}
    assert "a run refers to it" in lines["used"] and "a run refers to it" in lines["linked"]
    assert "'notes.txt'" in lines["foreign"] and "h ago" in lines["fresh"] and "features.json" in lines["broken"]


def test_the_folder_itself_may_be_the_cache(tmp_path):
    (tmp_path / "runs").mkdir()
    cache = _cache(tmp_path / "cache")
    main(_settings(tmp_path, caches=str(cache), runs=[str(tmp_path / "runs")], confirm=True))
    assert not cache.exists()


def test_unreadable_settings_of_a_run_stop_it(world):
    _run(world / "runs" / "three", "x")
    (world / "runs" / "three" / "settings.yaml").write_text("data: [")
    with pytest.raises(UserError, match="may name a cache; fix or remove it"):
        main(_settings(world, confirm=True))
    assert (world / "deep/unused").exists()


def test_missing_folders_are_mistakes(tmp_path):
    with pytest.raises(UserError, match="runs=/nowhere is not a folder"):
        main(_settings(tmp_path, runs=["/nowhere"]))
    with pytest.raises(UserError, match="caches=/nowhere is not a folder"):
        main(_settings(tmp_path, caches="/nowhere"))


def test_the_flag_runs_it(world, capsys):
    assert cli.main(["features", "--clean", "--set", f"caches={world}", "--set", f"runs=[{world}]"]) == 0
    assert f"unused  {world}/deep/unused" in capsys.readouterr().out
    assert cli.main(["features", "--clean", "--set", f"caches={world}"]) == 2
    assert "'runs' is missing" in capsys.readouterr().err


def test_remote_caches_are_cleaned_too():
    """fsspec's memory filesystem stands for every remote one."""
    for name in ("used", "unused"):
        write_spec(f"memory://clean/caches/{name}", SPEC)
    from pipelines.data import storage

    storage.write_text("memory://clean/runs/a/settings.yaml", "data: {features: 'memory://clean/caches/used'}")
    settings = {"caches": "memory://clean/caches", "runs": ["memory://clean/runs"], "min_age_h": 0, "confirm": True}
    told = main(CleanFeaturesSettings.model_validate(settings))
    assert told == {"removed": ["memory://clean/caches/unused"], "kept": ["memory://clean/caches/used"]}
    assert storage.list_files("memory://clean/caches") == ["used/features.json"]
