"""Tables on narrow terminals."""

import re

import pytest

from tests.command import TINY, vmoe

BORDERS = r"[\s─-╿]+"
UNIT = r"[\d.]+ (?:[kMG]B|µs|ms|nats)|[\d.]+% ± [\d.]+"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "widths"),
    [
        (("plan", "--config", TINY, "--devices", "1", "--device-memory", "8GB"), (80, 60)),
        (("models",), (80, 60)),
        (("inspect", "vmoe_emoji"), (80,)),  # two long names do not fit into 60
        (
            ("evaluate", "--checkpoint", "vmoe_emoji", "--data", "emoji_sample", "--per-class"),
            (80, 60),
        ),
    ],
    ids=["plan", "models", "inspect", "evaluate"],
)
def test_no_table_breaks_a_word_or_is_wider_than_the_terminal(
    command: tuple[str, ...], widths: tuple[int, ...]
) -> None:
    wide = vmoe(*command)
    assert wide.returncode == 0, wide.stderr
    expected = {*re.split(BORDERS, without_speed(wide.stdout))}
    for width in widths:
        narrow = without_speed(vmoe(*command, width=str(width)).stdout)
        rows = [line for line in narrow.splitlines() if re.match("[─-╿]", line)]
        assert rows and max(map(len, rows)) <= width
        assert {*re.split(BORDERS, narrow)} == expected
        assert {*re.findall(UNIT, narrow)} == {*re.findall(UNIT, wide.stdout)}


def without_speed(output: str) -> str:
    return re.sub(r"[\d,]+ images/s", "images/s", output)
