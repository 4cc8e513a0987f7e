"""Random chains, merged to random depths between writes, read as one byte array that knows nothing of chains."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.crash_files import scratch_folder
from vhdx.chain import open_vhdx
from vhdx.check import check_disk
from vhdx.create import create_disk
from vhdx.describe import file_sizes
from vhdx.merge_chain import held, merge_chain, plan_chain_merge
from vhdx.resize import resize_disk
from vhdx.survey import survey_chain, survey_folder
from vhdx.writer import open_writable

MIB = 1 << 20
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1 << 20)),
        st.tuples(st.just("trim"), st.integers(0, 1 << 20)),
        st.tuples(st.just("checkpoint"), st.sampled_from([1, 2])),
        st.tuples(st.just("merge"), st.integers(1, 4)),
        st.tuples(st.just("grow"), st.integers(1, 9)),
    ),
    min_size=6,
    max_size=24,
)


@settings(max_examples=25, deadline=None)
@given(steps=STEPS, sector_size=st.sampled_from([512, 4096]))
def test_whatever_is_merged_every_file_that_stays_reads_the_same(
    steps: list[tuple[str, int]], sector_size: int
) -> None:
    with scratch_folder() as folder:
        paths = [folder / "disk.vhdx"]
        create_disk(paths[0], size=3 * MIB, block_size=MIB, sector_size=sector_size)
        models = [bytearray(3 * MIB)]
        for number, (kind, value) in enumerate(steps):
            if kind in ("write", "trim"):
                _change(paths[-1], models[-1], kind, random.Random(value))
            elif kind == "checkpoint" and len(paths) < 7:
                path = folder / f"c{number}.avhdx"
                create_disk(path, parent=paths[-1], block_size=value * MIB)
                paths.append(path)
                models.append(bytearray(models[-1]))
            elif kind == "grow" and len(models[-1]) < 5 * MIB:
                size = len(models[-1]) + value * 65536
                resize_disk(paths[-1], size)
                models[-1] += bytes(size - len(models[-1]))
            elif kind == "merge":
                _merge(paths, models, keep=value)
        _merge(paths, models, keep=1)
        assert len(paths) <= 2
        for path in paths:
            assert not [one for one in check_disk(path).findings if one.severity == "error"]


def _change(path: Path, model: bytearray, kind: str, chance: random.Random) -> None:
    offset = chance.randrange(len(model))
    length = min(len(model) - offset, chance.choice([1, 600, 70_000, MIB + 5]))
    data = chance.randbytes(length) if kind == "write" else bytes(length)
    model[offset : offset + length] = data
    with open_writable(path) as disk:
        if kind == "write":
            disk.write_at(offset, data)
        else:
            disk.trim(offset, length)


def _merge(paths: list[Path], models: list[bytearray], *, keep: int) -> None:
    """Merge, and hold against the models: the first file becomes what the newest that was merged into it was."""
    merged = max(0, len(paths) - 1 - keep)
    plan = plan_chain_merge(paths[-1], keep=keep)
    assert [*plan.merged] == paths[1 : 1 + merged]
    before = file_sizes(paths[0])[1]
    with held(plan.files) as files:
        merge_chain(plan, files=files)
    # Whatever room was foretold was enough; what each merged file took was free again before the next.
    after = file_sizes(paths[0])[1]
    assert before is None or after is None or after - before <= plan.growth_bytes + plan.freed_bytes
    del paths[1 : 1 + merged], models[:merged]
    for path, model in zip(paths, models, strict=True):
        with open_vhdx(path) as disk:
            assert disk.read_at(0, disk.size) == model
    chain = survey_chain(paths[-1])
    assert [link.path for link in chain.links] == paths[::-1]
    assert (chain.broken, chain.above, chain.left_over) == (None, (), ())
    assert [one.path for one in survey_folder(paths[0].parent)] == [paths[-1]]
