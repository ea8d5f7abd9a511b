"""The process that brings spools to MLflow: `python -m lora_pipeline.tracking.courier SPOOL`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lora_pipeline.tracking.spool import Sent, Spool
from lora_pipeline.tracking.store import end_run, open_store, send, start_run


def main(folder: Path) -> int:
    """Deliver the spool in `folder`, then those of the project that no other courier has. Returns 1 if it stays."""
    own = delivered(Spool(folder))
    for other in sorted(folder.parent.iterdir()):
        if other != folder:
            delivered(Spool(other))
    return 0 if own else 1


def delivered(spool: Spool) -> bool:
    """Deliver one spool and remove it; whether it is in good hands."""
    with spool.owned() as mine:
        if not mine:
            return True
        try:
            deliver(spool)
        except Exception as error:  # noqa: BLE001 - whatever a store does is told to the stage, which goes on
            spool.write_error((str(error) or type(error).__name__).splitlines()[0])
            return False
        shutil.rmtree(spool.folder)
        return True


def deliver(spool: Spool) -> None:
    """Deliver until the stage has ended, from where an earlier courier stopped. Raises whatever the store raises."""
    identity = spool.identity()
    client, experiment = open_store(Path(identity.root), identity.address)
    sent = spool.sent() or Sent(start_run(client, experiment, identity), 0)
    spool.write_sent(sent)
    for events, position in spool.batches(sent.position):
        send(client, sent.run, events, spool.files)
        for event in events:
            if event.kind == "end":
                end_run(client, sent.run, event)
        spool.write_sent(Sent(sent.run, position))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
