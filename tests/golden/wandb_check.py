"""Reads `run.wandb`, which the tests of `src/stages/train/wandb.rs` hold their bytes against, with the reader and the
messages of wandb itself, checks config, history, summary and exit, and that wandb's writer gives the same bytes.

    pip install wandb==0.20.1 'protobuf<7'     # the last line of versions whose reader is Python
    python tests/golden/wandb_check.py [FILE]

A newer wandb shows the same with `wandb sync --dry-run DIR`, where DIR is the folder around the file.
"""

import json
import pathlib
import sys
import tempfile

import wandb

wandb._assert_is_internal_process = True

from wandb.proto import wandb_internal_pb2 as messages  # noqa: E402
from wandb.sdk.internal.datastore import DataStore  # noqa: E402


def records(path):
    store = DataStore()
    store.open_for_scan(path)
    while (data := store.scan_data()) is not None:
        record = messages.Record()
        record.ParseFromString(data)
        yield record


def written_again(found):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run.wandb"
        store = DataStore()
        store.open_for_write(str(path))
        for record in found:
            store.write(record)
        store.close()
        return path.read_bytes()


def values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else str(pathlib.Path(__file__).parent / "run.wandb")
    found = list(records(path))
    assert written_again(found) == pathlib.Path(path).read_bytes()
    kinds = [record.WhichOneof("record_type") for record in found]
    assert [record.num for record in found] == list(range(1, len(found) + 1))
    assert kinds[:2] == ["header", "run"] and kinds[-2:] == ["summary", "exit"], kinds
    run = found[1].run
    config = values(run.config.update)
    history = [values(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    steps = [record.history.step.num for record in found if record.WhichOneof("record_type") == "history"]
    assert steps == [row["_step"] for row in history]
    summary = values(found[-2].summary.update)
    if len(sys.argv) == 1:
        assert (run.project, run.display_name) == ("notes", "adapter")
        assert config == {"rank": 4, "targets": ["q_proj"], "note": "ä" * 40_000}
        assert len(history) == 300 and history[1] == {"_step": 2, "train/loss": 1.25}
        assert history[-1] == {"_step": 300, "train/loss": 2.5 / 300, "eval/loss": 0.125}
        assert summary == {"loss": 0.25, "steps": 300, "eval_loss": None}
        assert found[-1].exit.exit_code == 0
    print(run.run_id, run.project, run.display_name, {key: config[key] for key in config if key != "note"})
    print(len(history), "steps, last", history[-1], "summary", summary)


main()
