"""Fixtures for all tests: real data when it is there, one Ray, untouched random states."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs.cluster.session import ray_process_environment, set_ray_environment

REPOSITORY = Path(__file__).resolve().parents[1]
TORCH_SEED = 73_939
"""Torch itself seeds every process anew. No test names this number, so that nothing draws the same twice."""
LAST_FILE = pytest.StashKey[Path]()


def _shared_folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable) or REPOSITORY / default).resolve()
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set {variable} to run the tests on it")
    return folder


@pytest.fixture(scope="session")
def test_data_dir() -> Path:
    """Real photographs and clips with MANIFEST.json; named by QFORMER_TEST_DATA."""
    return _shared_folder("QFORMER_TEST_DATA", "../shared/data")


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """Tensors recorded from reference implementations; named by QFORMER_GOLDENS."""
    return _shared_folder("QFORMER_GOLDENS", "../shared/goldens")


@pytest.fixture(autouse=True)
def _gpu(request):
    """Only who sets QFORMER_TEST_GPU says that there is one; then a driver that does not load is no reason to skip."""
    if request.node.get_closest_marker("gpu") and not os.environ.get("QFORMER_TEST_GPU"):
        pytest.skip("set QFORMER_TEST_GPU=1 where there is a GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A file's tests and fixtures draw the same from torch in every run, whatever ran before in this process."""
    torch = sys.modules.get("torch")
    if torch and item.config.stash.get(LAST_FILE, None) != item.path:
        item.config.stash[LAST_FILE] = item.path
        torch.manual_seed(TORCH_SEED)


@pytest.fixture(autouse=True)
def _restored_random_state():
    """No test changes what another draws."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")  # tests that never load it need not wait for it
    torch_state = torch.get_rng_state() if torch else None
    yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    if torch_state is not None:
        torch.set_rng_state(torch_state)


def pytest_configure():
    """Before any test module imports torch or ray, which read some of this when they load."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other worker has the other core
    # The end of a training waits for this poll; the tests' trainings are short.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    set_ray_environment()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Under pytest-xdist a file's tests run in one process, and those of every file that uses Ray in the same one.

    So there is one Ray, and what waits for it leaves its core to the other tests.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    with_ray = {item.path for item in items if "ray_local" in item.fixturenames}
    for item in items:
        group = "ray" if item.path in with_ray else str(item.path.relative_to(REPOSITORY))
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory):
    """One quiet local Ray for the whole run; its token lies in a folder of this run, not in HOME."""
    import ray

    token = tmp_path_factory.mktemp("ray") / "auth_token"
    token.write_text("0" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # as often as Ray can: a test reads them
        patch.setenv("REPORTER_UPDATE_INTERVAL_MS", "60000")  # figures of the machine, which no test reads
        for left in (2, 1, 0):
            try:
                with ray_process_environment():
                    ray.init(
                        address="local",
                        num_cpus=4,
                        object_store_memory=256 * 2**20,
                        include_dashboard=False,
                        logging_level="ERROR",
                        log_to_driver=False,
                    )
                break
            except Exception as error:  # a busy machine: Ray gives its own processes 30 s
                if not left or "timed out during startup" not in str(error):
                    raise
        yield ray
        ray.shutdown()
