"""Bare paho: pull the same blocks from the same broker, hash and write each, with a window of requests outstanding.

``python pull.py serve PORT FILE`` answers requests, ``python pull.py pull PORT BLOCKS OUT`` asks; nothing of Kedge. A
request is a block's number, an answer the number and 64 KiB.
"""

import hashlib
import os
import struct
import sys
import threading
import time

import paho.mqtt.client as mqtt

BLOCK = 64 * 1024
WINDOW = 16


def client(name: str, port: int) -> mqtt.Client:
    made = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name)
    made.connect("127.0.0.1", port)
    return made


def serve(port: int, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    made = client("bare-serve", port)

    def answer(_c: mqtt.Client, _u: object, message: mqtt.MQTTMessage) -> None:
        index = struct.unpack(">I", message.payload)[0]
        made.publish("bare/blk", message.payload + os.pread(fd, BLOCK, index * BLOCK))

    made.on_message = answer
    made.on_subscribe = lambda *_: print("ready", flush=True)
    made.subscribe("bare/req")
    made.loop_forever()


def pull(port: int, count: int, out: str) -> None:
    fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    made = client("bare-pull", port)
    hashes: dict[int, bytes] = {}
    asked = 0
    done = threading.Event()
    turn = threading.Lock()  # the first requests come from another thread than the answers

    def ask() -> None:
        nonlocal asked
        with turn:
            index, asked = asked, asked + 1
        if index < count:
            made.publish("bare/req", struct.pack(">I", index))

    def take(_c: mqtt.Client, _u: object, message: mqtt.MQTTMessage) -> None:
        index = struct.unpack_from(">I", message.payload)[0]
        data = memoryview(message.payload)[4:]
        hashes[index] = hashlib.sha256(data).digest()
        os.pwrite(fd, data, index * BLOCK)
        if len(hashes) == count:
            done.set()
        ask()

    ready = threading.Event()
    made.on_message = take
    made.on_subscribe = lambda *_: ready.set()
    made.subscribe("bare/blk")
    made.loop_start()
    ready.wait(10)
    start = time.perf_counter()
    for _ in range(WINDOW):
        ask()
    if not done.wait(60):
        sys.exit(f"the bare pull did not end: {len(hashes)} of {count} blocks came, {asked} were asked for")
    with open(out, "rb") as file:  # noqa: PTH123 -- as bare as it gets
        hashlib.file_digest(file, "sha256")
    print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), sys.argv[3])
    else:
        pull(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
