"""The command line: every mistake ends in one clear sentence and exit status 2."""

import pytest

from tests.conftest import run_commands

MISTAKES = [
    (["--config.model.lops=3"], "unknown config field 'model.lops'; did you mean 'model.loops'?"),
    (["--config.lr=3"], "unknown config field 'lr'; did you mean '"),
    (["--config.seed=-1"], "config.seed=-1 must be 0 or more"),
    (["--config=configs/quickstart.py:foo"], "this config takes no arguments after a colon"),
    (["--config=configs/sret_lt.py:groups=16-x-1"], "should read like groups=16-14-1"),
    (["--config=configs/sret_s.py", "--config.data.data_dir=/none"], "tools.prepare imagenet2012"),
    (["--workdir=/dev/null/x"], "the workdir /dev/null/x is not writable"),
    (["--config=configs/sret.py"], "there is no config file 'configs/sret.py'"),
    (["--config", "configs/sret.py"], "there is no config file 'configs/sret.py'"),
    (["--config=sret_jax/errors.py"], "has no attribute 'get_config'"),
    (["--config=configs/sret_t.py:unslicd"], "argument 'unslicd'; did you mean 'unsliced'?"),
    (["--config=configs/sret_t.py:res=big"], "res takes int"),
    (["--confg=x"], "Unknown command line flag 'confg'. Did you mean: config"),
    (["--config.batch_size=many"], "--config.batch_size=many"),
    (["--mode=evaluate"], "--mode=evaluate"),
    (["configs/sret_t.py"], "unexpected argument 'configs/sret_t.py'"),
    (["--processes=2"], "give all three, none, or --processes=1 alone"),
    (["--mode=eval"], "holds no checkpoints/"),
    (["--config.augment.mixupp=1.0"], "'augment.mixupp'; did you mean 'augment.mixup'?"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, digits_dir):
    """The outcome of each mistake."""
    commands = []
    for flags, _ in MISTAKES:
        command = ["main.py", *flags]
        if not any(flag.startswith("--workdir") for flag in flags):
            command.append(f"--workdir={tmp_path_factory.mktemp('run')}")
        if not any("config=" in flag or "data_dir" in flag for flag in flags):
            command.append(f"--config.data.data_dir={digits_dir}")
        commands.append(command)
    return run_commands(commands, tmp_path_factory.mktemp("printed"), devices=8)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda i: " ".join(MISTAKES[i][0]))
def test_a_mistake_is_one_sentence_and_status_2_before_any_compilation(number, outcomes):
    done, (_, sentence) = outcomes[number], MISTAKES[number]
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
    assert sentence in lines[0]
    assert "Compiling" not in done.stdout
