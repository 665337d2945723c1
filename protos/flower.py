"""The nouns of one training round, and their conversion to and from Flower's records.

Everything is checked while it is converted: lengths, types, names and bounds, and that the adapter
that arrives has the digest that was announced. Whether its numbers are finite is for the receiver's
floor to judge. Message types, and the function of the ClientApp that answers them:

======================  =======================  ============================================
message type            asks with                is answered with
======================  =======================  ============================================
``train``               :class:`TrainTask`       :class:`aggregation.update.Update`
``train.sketch``        :class:`SketchTask`      :class:`SketchReply`
``train.secure``        :class:`SecureTask`      :class:`SecureReply`
``evaluate``            :class:`EvaluateTask`    :class:`EvaluateResult`
``query.identity``      nothing                  :class:`Identity`
======================  =======================  ============================================

Where updates are added up by a secure sum, the first two are answered with :class:`Ready`, and the
third carries its five steps. Any of them may be answered by a :class:`ClientFault` instead, made
with :func:`fault_reply`: a word of a closed list, never the text of an exception, which could quote
a client's data.

    >>> from aggregation.adapter import Adapter
    >>> from aggregation.spec import AdapterSpec, ModuleSpec
    >>> spec = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))
    >>> start = Adapter.zeros(spec)
    >>> task = TrainTask(run="r1", round=1, adapter=start, plan={"epochs": 1.0},
    ...                  assignment={"trains": "B", "sends": "B"}, codec="int8")
    >>> asked = train_task_from(train_task_record(task))
    >>> asked.plan, asked.codec
    ({'epochs': 1.0}, 'int8')

A client trains, and packs what it was asked to send as its last act; the server puts the update
together again with the adapter that it handed out::

    >>> from aggregation.codecs import read_codec
    >>> from aggregation.parcel import send
    >>> from aggregation.train import Assignment
    >>> from aggregation.update import Update
    >>> trained = Adapter(spec, {key: value + 0.5 for key, value in start})
    >>> assignment = Assignment.from_mapping(asked.assignment)
    >>> update = Update("client-00001", 1, start.digest, trained, weight=3.0)
    >>> update, memory = send(update, asked.adapter, assignment, read_codec(asked.codec))
    >>> record = update_record(update)
    >>> handed_out = {start.digest: start}
    >>> came = update_from(record, handed_out.get, assignment=assignment, codec="int8")
    >>> came.adapter.digest == update.adapter.digest, record_bytes(record)
    (True, 10)

The next task leaves out what the client still has, and a client that has it no longer says so::

    >>> later = train_task_record(task, held=start)
    >>> record_bytes(later)
    0
    >>> train_task_from(later, handed_out.get).held == start.digest
    True
    >>> train_task_from(later)
    Traceback (most recent call last):
    ...
    protos.fields.MissingStart: the task builds on the adapter ..., which is not here
"""

from __future__ import annotations

from protos.fields import MissingStart, RecordError
from protos.flower_arrays import ADAPTER, SERIALISATION, record_bytes
from protos.flower_replies import (
    METRICS,
    evaluate_result_from,
    evaluate_result_record,
    event_from,
    fault_of,
    fault_reply,
    identity_from,
    identity_record,
    sketch_reply_from,
    sketch_reply_record,
    update_from,
    update_record,
)
from protos.flower_secure import (
    ready_from,
    ready_record,
    secure_reply_from,
    secure_reply_record,
    secure_task_from,
    secure_task_record,
)
from protos.flower_tasks import (
    SCHEMA,
    TASK,
    evaluate_task_from,
    evaluate_task_record,
    sketch_task_from,
    sketch_task_record,
    train_task_from,
    train_task_record,
)
from protos.secure import STEPS, Ready, SecureReply, SecureTask
from protos.tasks import (
    ClientFault,
    EvaluateResult,
    EvaluateTask,
    Identity,
    SketchReply,
    SketchTask,
    TrainTask,
    client_data,
    client_ledger,
    client_name,
    client_roster,
)

__all__ = [
    "ADAPTER",
    "EVALUATE",
    "IDENTITY",
    "METRICS",
    "SCHEMA",
    "SECURE",
    "SERIALISATION",
    "SKETCH",
    "STEPS",
    "TASK",
    "TRAIN",
    "ClientFault",
    "EvaluateResult",
    "EvaluateTask",
    "Identity",
    "MissingStart",
    "Ready",
    "RecordError",
    "SecureReply",
    "SecureTask",
    "SketchReply",
    "SketchTask",
    "TrainTask",
    "client_data",
    "client_ledger",
    "client_name",
    "client_roster",
    "evaluate_result_from",
    "evaluate_result_record",
    "evaluate_task_from",
    "evaluate_task_record",
    "event_from",
    "fault_of",
    "fault_reply",
    "identity_from",
    "identity_record",
    "ready_from",
    "ready_record",
    "record_bytes",
    "secure_reply_from",
    "secure_reply_record",
    "secure_task_from",
    "secure_task_record",
    "sketch_reply_from",
    "sketch_reply_record",
    "sketch_task_from",
    "sketch_task_record",
    "train_task_from",
    "train_task_record",
    "update_from",
    "update_record",
]

TRAIN = "train"
SKETCH = "train.sketch"
SECURE = "train.secure"
EVALUATE = "evaluate"
IDENTITY = "query.identity"
