"""Order, sharding, resume: which rows every process and loader worker gets."""

import itertools
import json
import random

import accelerate
import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from annotation_rows import image_row, text_row, turns, video_row, write_rows
from torch.utils.data import DataLoader

from etchat_hf.data import (
    DataSource,
    ETChatBatchSampler,
    ETChatDataCollator,
    ETChatDataset,
    SampleEncoder,
    UnusableDataError,
)


class RowsOnly:
    """Stands in for the encoder where only the order matters: a sample is its row's id."""

    def __call__(self, row, clip, rng):
        if row.get("broken"):
            raise ValueError("broken on purpose")
        return {"id": row["id"], "random": rng.random(), "was_cut": False}


def make_dataset(tmp_path, rows, encoder=None, **options):
    source = DataSource(write_rows(tmp_path / "rows.json", rows), str(tmp_path), str(tmp_path))
    return ETChatDataset([source], encoder or RowsOnly(), **options)


def rows_per_rank(sampler, world_size):
    return [
        [[key.row for key in batch] for batch in BatchSamplerShard(sampler, world_size, rank)]
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_ranks_cover_every_row_once_and_see_as_many_batches(tmp_path, world_size, batch_size):
    dataset = make_dataset(tmp_path, [text_row(i) for i in range(24)])
    sampler = ETChatBatchSampler(dataset, batch_size, world_size)
    ranks = rows_per_rank(sampler, world_size)
    assert {len(batches) for batches in ranks} == {24 // batch_size // world_size}
    assert len(sampler) == sum(map(len, ranks))
    assert sorted(itertools.chain(*itertools.chain(*ranks))) == list(range(24))


@pytest.mark.parametrize(("rows", "world_size", "batch_size"), [(10, 3, 1), (7, 2, 2), (1, 3, 2), (5, 1, 4)])
def test_uneven_numbers_repeat_fewer_rows_than_one_step(tmp_path, rows, world_size, batch_size):
    dataset = make_dataset(tmp_path, [text_row(i) for i in range(rows)])
    ranks = rows_per_rank(ETChatBatchSampler(dataset, batch_size, world_size), world_size)
    seen = list(itertools.chain(*itertools.chain(*ranks)))
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
    assert set(seen) == set(range(rows))
    assert len(seen) - rows < world_size * batch_size


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("num_rows", [48, 45, 7, 1])
def test_layouts_with_equal_global_batches_take_equal_steps(tmp_path, grouped, num_rows):
    rows = [video_row(i) if i % 3 else text_row(i) for i in range(num_rows)]
    dataset = make_dataset(tmp_path, rows, group_by_modality=grouped)
    steps = []
    for world_size, batch_size in ((2, 2), (1, 4), (1, 1)):
        ranks = rows_per_rank(ETChatBatchSampler(dataset, batch_size, world_size, global_batch_size=4), world_size)
        per_step = 4 // batch_size // world_size
        steps.append(
            [
                sorted(
                    itertools.chain(*(row for rank in ranks for row in rank[step * per_step : (step + 1) * per_step]))
                )
                for step in range(len(ranks[0]) // per_step)
            ]
        )
    assert steps[0] == steps[1] == steps[2]
    assert {len(step) for step in steps[0]} == {4}
    assert set(itertools.chain(*steps[0])) == set(range(num_rows))


def test_epochs_differ_and_repeat_exactly(tmp_path):
    dataset = make_dataset(tmp_path, [text_row(i) for i in range(20)])
    sampler = ETChatBatchSampler(dataset, 2)
    orders = [sampler.batches(epoch).tolist() for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert (
        ETChatBatchSampler(make_dataset(tmp_path, [text_row(i) for i in range(20)], seed=1), 2).batches(0).tolist()
        != orders[0]
    )
    assert ETChatBatchSampler(dataset, 2, shuffle=False).batches(0).tolist() == np.arange(20).reshape(-1, 2).tolist()


def test_grouped_batches_hold_one_modality_and_every_row(tmp_path):
    rows = [video_row(i) for i in range(11)] + [image_row(i) for i in range(13)] + [text_row(i) for i in range(6)]
    random.Random(0).shuffle(rows)
    dataset = make_dataset(tmp_path, rows, group_by_modality=True)
    sampler = ETChatBatchSampler(dataset, 2, world_size=2, global_batch_size=8)
    batches = sampler.batches(0)
    assert len(batches) == len(sampler) and len(batches) % 2 == 0
    kinds = dataset.modality[batches]
    assert set(batches.flatten().tolist()) == set(range(30))
    per_step = kinds.reshape(-1, 8)
    assert len(per_step) == 5 and (per_step == per_step[:, :1]).all()
    assert len(set(kinds[:, 0].tolist())) == 3
    for batch in sampler:
        for key in batch:
            assert {dataset.modality[spare] for spare in key.spares} <= {dataset.modality[key.row]}


def test_spares_are_the_next_of_the_same_ranks_stream(tmp_path):
    dataset = make_dataset(tmp_path, [text_row(i) for i in range(30)])
    sampler = ETChatBatchSampler(dataset, 1, world_size=3)
    for rank in range(3):
        stream = [batch[0] for batch in BatchSamplerShard(sampler, 3, rank)]
        for position, key in enumerate(stream):
            following = [stream[(position + k) % len(stream)].row for k in range(1, 10)]
            assert list(key.spares) == following


def test_weights_say_how_often_a_row_is_seen(tmp_path):
    names = [
        write_rows(tmp_path / f"{name}.json", [text_row(i) for i in range(n)]) for name, n in (("a", 10), ("b", 8))
    ]
    dataset = ETChatDataset([DataSource(names[0], weight=2.0), DataSource(names[1], weight=0.5)], RowsOnly())
    sampler = ETChatBatchSampler(dataset, 1)
    first, second = (np.bincount(sampler.batches(epoch).flatten(), minlength=18) for epoch in (0, 1))
    assert len(sampler) == 24
    assert (first[:10] == 2).all() and first[10:].sum() == 4 and first.max() == 2
    assert (first[10:] != second[10:]).any()


def test_filters_use_durations_and_words_of_the_first_answer(tmp_path):
    long_answer = {"conversations": turns("Q", "a b c d", "Q", "a"), "id": "long"}
    rows = [video_row(0, 4), video_row(1, 5), video_row(2, 351), long_answer, text_row(4)]
    path = write_rows(tmp_path / "rows.json", rows)
    for filters, expected in (
        ({}, [0, 1, 2, 3, 4]),
        ({"min_duration": 5, "max_duration": 350}, [1, 3, 4]),
        ({"max_words": 3}, [4]),
        ({"max_words": 4}, [3, 4]),
    ):
        if filters.get("max_words") is None:
            dataset = ETChatDataset([DataSource(path, **filters)], RowsOnly())
            assert dataset.sources[0].row_of.tolist() == expected
        else:
            kept = ETChatDataset([DataSource(path, **filters)], RowsOnly()).sources[0].row_of.tolist()
            assert [row for row in kept if row >= 3] == expected
    with pytest.raises(ValueError, match="none of its 5 rows passes"):
        ETChatDataset([DataSource(path, max_words=0)], RowsOnly())


def loader_of(dataset, workers, batch_size=2, world_size=1, rank=0):
    sampler = ETChatBatchSampler(dataset, batch_size, world_size)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list)
    return prepare_data_loader(loader, num_processes=world_size, process_index=rank, put_on_device=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_skips_by_arithmetic_and_is_exact(tmp_path, workers):
    rows = [text_row(i) for i in range(24)]
    rows[5]["broken"] = True
    dataset = make_dataset(tmp_path, rows)
    for epoch in (0, 1):
        for rank in (0, 1):
            whole = loader_of(dataset, workers, world_size=2, rank=rank)
            whole.set_epoch(epoch)
            batches = list(whole)
            assert len(batches) == 6
            resumed_dataset = make_dataset(tmp_path, rows)
            rest = accelerate.skip_first_batches(loader_of(resumed_dataset, workers, world_size=2, rank=rank), 4)
            rest.set_epoch(epoch)
            assert list(rest) == batches[4:]
            assert resumed_dataset.skips.num_read == 4  # nothing that was consumed before has been read again


def test_number_of_workers_changes_nothing(tmp_path):
    rows = [text_row(i) for i in range(30)]
    rows[3]["broken"] = rows[17]["broken"] = True
    results = [list(loader_of(make_dataset(tmp_path, rows), workers)) for workers in (0, 1, 2)]
    assert results[0] == results[1] == results[2]


def test_unreadable_samples_are_replaced_counted_and_logged(tmp_path, caplog):
    rows = [text_row(i) for i in range(20)]
    rows[7]["broken"] = True
    log = tmp_path / "out" / "skipped.jsonl"
    dataset = make_dataset(tmp_path, rows, skip_log=log)
    sampler = ETChatBatchSampler(dataset, 1)
    stream = [batch[0].row for batch in sampler]
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, collate_fn=list)
    seen = [batch[0]["id"] for batch in loader]
    expected = [row if row != 7 else stream[(i + 1) % 20] for i, row in enumerate(stream)]
    assert seen == expected
    assert (dataset.skips.num_read, dataset.skips.num_skipped) == (20, 1)
    (entry,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert entry == {"sample": f"{tmp_path}/rows.json row 7", "id": 7, "reason": "broken on purpose"}
    assert dataset.skips.summary().splitlines() == [
        "20 samples read, 1 skipped, 0 cut at max_length (this process)",
        "     1 x broken on purpose",
    ]


def test_a_torn_line_of_the_log_is_counted(tmp_path):
    log = tmp_path / "skipped.jsonl"
    dataset = make_dataset(tmp_path, [text_row(i) for i in range(4)], skip_log=log)
    dataset.skips.add_skip("a row 1", 1, "broken")
    with open(log, "a", encoding="utf-8") as file:
        file.write(log.read_text()[:25] + "\n")
    dataset.skips.add_skip("a row 2", 2, "broken")
    assert dataset.skips.summary().splitlines()[1:] == [
        "     2 x broken",
        f"     1 lines of {log} are not readable: a process was killed while it wrote",
    ]


def test_too_many_failures_stop_the_run(tmp_path):
    rows = [text_row(i) | ({"broken": True} if i % 3 == 0 else {}) for i in range(90)]
    dataset = make_dataset(tmp_path, rows, max_failure_rate=0.1)
    loader = DataLoader(dataset, batch_sampler=ETChatBatchSampler(dataset, 1), num_workers=2, collate_fn=list)
    with pytest.raises(
        UnusableDataError, match=r"more than max_failure_rate \(0.1\) allows.*broken on purpose"
    ) as error:
        list(loader)
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def test_when_nothing_can_stand_in_the_run_stops(tmp_path):
    dataset = make_dataset(tmp_path, [text_row(i) | {"broken": True} for i in range(3)])
    with pytest.raises(UnusableDataError, match="could stand in for it are all unusable"):
        dataset[0]


def test_mistakes_in_code_are_not_taken_for_bad_samples(tmp_path):
    def encoder(row, clip, rng):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        make_dataset(tmp_path, [text_row(0)], encoder)[0]


def test_real_samples_through_two_workers(processor, media, tmp_path):
    rows = [video_row(0), image_row(1), text_row(2), video_row(4), video_row(5), video_row(0, video="clips/gone.mp4")]
    rows.append(video_row(1, video="../../etc/passwd"))
    path = write_rows(tmp_path / "rows.json", rows)
    (media / "clips" / "bad.mp4").write_bytes(b"not a video")
    rows.append(video_row(2, video="clips/bad.mp4"))
    path = write_rows(tmp_path / "rows.json", rows)
    source = DataSource(path, image_root=str(media), video_root=str(media))
    log = tmp_path / "skipped.jsonl"
    dataset = ETChatDataset([source], SampleEncoder(processor), skip_log=log)
    loader = DataLoader(
        dataset,
        batch_sampler=ETChatBatchSampler(dataset, 2),
        num_workers=2,
        collate_fn=ETChatDataCollator(processor),
    )
    batches = list(loader)
    assert [len(batch["input_ids"]) for batch in batches] == [2] * 4
    reasons = " ".join(json.loads(line)["reason"] for line in log.read_text().splitlines())
    assert "no such file" in reasons and "leaves the root folder" in reasons and "not a readable video" in reasons
    for batch in batches:
        frames = sum(len(times) for times in batch.get("frame_times", []))
        assert (batch["input_ids"] == processor.image_token_id).sum() == frames
