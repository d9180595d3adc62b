import pytest
from etils import epath

from sret_jax.errors import UserError
from sret_jax.run.rollback import ROLLBACKS_FILE, Rollbacks


def test_the_steps_of_all_windows_are_passed_over():
    rollbacks = Rollbacks(((11, 14), (11, 17), (21, 30), (19, 33)))
    continues_at = {9: 9, 10: 17, 12: 17, 17: 17, 18: 33, 20: 33, 25: 33, 33: 33}
    assert {step: rollbacks.continues_at(step) for step in continues_at} == continues_at
    assert Rollbacks().continues_at(10) == 10


def test_windows_come_back_from_disk(tmp_path):
    workdir = epath.Path(tmp_path)
    assert Rollbacks.read(workdir) == Rollbacks()
    rollbacks = Rollbacks().with_window(1, 4).with_window(1, 8)
    rollbacks.write(workdir)
    assert Rollbacks.read(workdir) == rollbacks
    assert str(rollbacks) == "steps 1 to 4, steps 1 to 8"


@pytest.mark.parametrize("text", ["", "[]", '{"windows": 3}', '{"windows": [[1]]}'])
def test_a_file_changed_by_hand_is_an_error_that_shows_the_form(text, tmp_path):
    (tmp_path / ROLLBACKS_FILE).write_text(text)
    with pytest.raises(UserError, match=r'does not read {"windows": \[\[first, last\], ...\]}'):
        Rollbacks.read(epath.Path(tmp_path))
