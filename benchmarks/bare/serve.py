"""The least that a server in Python does for a request with a binary tensor: it waits, receives, quantizes, calls
LiteRT's interpreter and sends. It parses nothing, checks nothing, and takes requests to come whole.

``python serve.py PORT MODEL.tflite``
"""

from __future__ import annotations

import select
import socket
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n"


def main() -> None:
    """Serve until the process is ended."""
    interpreter = Interpreter(sys.argv[2], num_threads=1)
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    scale, zero = np.float32(given["quantization"][0]), given["quantization"][1]
    taken, shape = 4 * int(np.prod(given["shape"])), given["shape"]
    listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    poll = select.epoll()
    poll.register(listening, select.EPOLLIN)
    links: dict[int, socket.socket] = {}
    buffer = bytearray(1 << 18)
    while True:
        for number, _ in poll.poll():
            if number == listening.fileno():
                link, _ = listening.accept()
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                links[link.fileno()] = link
                poll.register(link, select.EPOLLIN)
                continue
            size = links[number].recv_into(buffer)
            if not size:
                links.pop(number).close()
                continue
            answer = b"{}"
            if size > taken:
                sample = np.frombuffer(bytes(buffer[size - taken : size]), np.float32)
                values = np.clip(np.rint(sample / scale) + zero, -128, 127).astype(np.int8)
                interpreter.set_tensor(given["index"], values.reshape(shape))
                interpreter.invoke()
                answer = interpreter.get_tensor(made["index"]).tobytes()
            links[number].send(HEAD % len(answer) + answer)


if __name__ == "__main__":
    main()
