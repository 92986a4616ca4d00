"""The HTTP side of serving: OpenAI's API over an engine and a store of adapters. It needs the extra `serve`.

shapes.py    bodies of requests and answers, and of errors
answers.py   one request: its choices from the engine, and the reply, whole or as events
service.py   what all requests share
metrics.py   Prometheus
door.py      what every request passes: keys, request ids, the access log, draining
routes.py    the paths
server.py    a process that listens, and stops well
"""

import importlib

from lorica.errors import LoricaError

try:
    importlib.import_module("prometheus_client")
    importlib.import_module("pydantic")
    importlib.import_module("starlette")
    importlib.import_module("uvicorn")
except ImportError as missing:
    raise LoricaError(f'serving needs {missing.name}: pip install "lorica[serve]"') from missing
