#!/usr/bin/env python3
"""Writes three scalars with TensorBoard's own record writer and protobufs and reads them, and any event files named,
back with its EventAccumulator -> events.out.tfevents.0.tunesmith. usage: tensorboard_check.py [FILE...]   (tensorboard 2.21)"""
import io, os, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "events.out.tfevents.0.tunesmith")
events = [Event(wall_time=0.0, file_version="brain.Event:2")]
for tag, step, value in [("train/loss", 1, 2.5), ("train/loss", 300, 0.125), ("eval/loss", 300, 1.0)]:
    events.append(Event(wall_time=float(step), step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))
class Keep(io.BytesIO):
    def close(self): pass
buffer = Keep(); writer = RecordWriter(buffer)
# protobuf leaves out a wall_time of 0, which reads the same; this project writes it.
for event in events: writer.write((b"\x09" + bytes(8) if event.wall_time == 0 else b"") + event.SerializeToString())
open(path, "wb").write(buffer.getvalue())
for file in [path, *sys.argv[1:]]:
    read = EventAccumulator(file); read.Reload()
    print(file, {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]})
