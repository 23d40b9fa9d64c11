import pytest

from jobs.folders.output import require_unused
from qformer.errors import UserError


def test_a_used_folder_is_refused(tmp_path):
    require_unused(str(tmp_path / "new"), "output")
    require_unused(str(tmp_path), "output")
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match=r"output=.*already used \(it holds x\)"):
        require_unused(str(tmp_path), "output")
    with pytest.raises(UserError, match="is a file"):
        require_unused(str(tmp_path / "x"), "output")
