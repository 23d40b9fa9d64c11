"""The config for `serve deploy`: it holds what was set, and what it names builds the same application."""

import importlib

import pytest
import yaml

from jobs.cli import main as cli
from jobs.serve.config import ApplicationSettings
from jobs.serve.job import resolve_service
from jobs.settings.serve import ServeSettings
from qformer.errors import UserError
from tests.tiny_checkpoints import write_stage1, write_stage2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_stage2(tmp_path_factory.mktemp("runs") / "tiny" / "checkpoints" / "step-00000003")


def written(tmp_path, checkpoint, *more):
    file = tmp_path / "app.yaml"
    code = cli.main(["serve", "--write-config", str(file), "--set", f"checkpoint={checkpoint}", *more])
    assert code == 0
    return yaml.safe_load(file.read_text())


def test_the_config_builds_the_application_it_was_written_for(tmp_path, checkpoint, capsys):
    config = written(
        tmp_path, checkpoint, "--set", "generator.min_replicas=0", "--set", "port=8123", "--set", "requests.timeout_s=9"
    )
    assert "serve deploy" in capsys.readouterr().out
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123, "request_timeout_s": 19.0}
    [app] = config["applications"]
    module, _, name = app["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    settings = ApplicationSettings.model_validate(app["args"])
    assert settings.generator.min_replicas == 0 and settings.requests.timeout_s == 9
    ingress = build(settings)._bound_deployment
    assert ingress.name == "Ingress"
    # A replica that goes ends its answers: in the time that one may take, which is more than Ray's own 20 s.
    replicas = [ingress, *[one._bound_deployment for one in ingress.init_args if hasattr(one, "_bound_deployment")]]
    assert {one.name: one._deployment_config.graceful_shutdown_timeout_s for one in replicas} == dict.fromkeys(
        ["Ingress", "Media", "Encoder", "Generator"], 19.0
    )
    live = {deployment["name"]: deployment["user_config"] for deployment in app["deployments"]}
    assert [adapter["name"] for adapter in live["Ingress"]["adapters"]] == ["tiny"]
    # The arguments are the same for a newer checkpoint: what is deployed then restarts nothing.
    assert str(checkpoint) + "/" not in yaml.safe_dump(app["args"]) and "step-00000003" in str(live)


def test_nothing_is_written_that_could_not_be_served(tmp_path, checkpoint, capsys):
    stage1 = write_stage1(tmp_path / "search")
    (stage1 / "bridge.json").write_text((stage1 / "bridge.json").read_text().replace("test_vit", "test_vit2"))
    file = tmp_path / "app.yaml"
    words = ["serve", "--write-config", str(file), "--set", f"checkpoint={checkpoint}"]
    assert cli.main([*words, "--set", f"adapters.search={stage1}"]) == 2
    assert "'search' has another vision encoder (name='test_vit2')" in capsys.readouterr().err
    assert cli.main([*words, "--set", "host=0.0.0.0"]) == 2
    assert "without API keys" in capsys.readouterr().err
    assert cli.main([*words, "--set", "generation.num_beams=3"]) == 2
    assert not file.exists()


def test_the_name_of_a_checkpoint_stays_when_a_newer_one_comes(checkpoint):
    [first] = resolve_service(ServeSettings(checkpoint=str(checkpoint.parents[1]))).adapters
    assert (first.name, first.version) == ("tiny", "tiny/step-00000003")
    newer = checkpoint.with_name("step-00000004")
    newer.symlink_to(checkpoint)
    [second] = resolve_service(ServeSettings(checkpoint=str(checkpoint.parents[1]))).adapters
    assert (second.name, second.version) == ("tiny", "tiny/step-00000004") and second.key != first.key
    newer.unlink()
    with pytest.raises(UserError):
        resolve_service(ServeSettings(checkpoint=str(checkpoint), api_keys="missing.json"))
