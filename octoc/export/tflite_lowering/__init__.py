"""The steps of the TFLite exporter.

flat      a flatbuffer as operations and values, and back
places    where the converter put each weight
integers  float operations between DEQUANTIZE and QUANTIZE become integer operations
weights   a compressed weight as constants of the file, and back
"""

from importlib.util import find_spec

from octoc.errors import HostError

for _package in ("litert_torch", "ai_edge_litert"):
    if find_spec(_package) is None:
        raise HostError(f'TFLite needs the package {_package}: pip install "octoc[tflite]"')
