"""Worker process of `dicom`: reads slices on request.

A script that imports nothing of jaxreg. Asked by lines of JSON on stdin, for the header
of one file or for the voxels of several, it answers on stdout with a line of JSON,
then the voxels.
"""

import json
import pathlib
import signal
import sys
from typing import Any

import numpy as np
import SimpleITK as sitk

_TAGS = {
    "series": "0020|000e",
    "number": "0020|0011",
    "described": "0008|103e",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "intercept": "0028|1052",
    "slope": "0028|1053",
}
_DTYPES = {
    **{sitk.sitkUInt8: "u1", sitk.sitkInt8: "i1", sitk.sitkUInt16: "u2"},
    **{sitk.sitkInt16: "i2", sitk.sitkUInt32: "u4", sitk.sitkInt32: "i4"},
    **{sitk.sitkUInt64: "u8", sitk.sitkInt64: "i8"},
    **{sitk.sitkFloat32: "f4", sitk.sitkFloat64: "f8"},
}


def _limit_memory(more: int) -> None:
    """Lets the process take so many bytes more than it has, where Linux counts them."""
    try:
        import resource

        status = pathlib.Path("/proc/self/status").read_text("ascii")
        taken = 1024 * int(status.split("VmData:")[1].split()[0])
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = taken + more
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    except (ImportError, OSError, ValueError, IndexError):
        return


def _tag(reader: Any, key: str) -> str:
    if not reader.HasMetaDataKey(key):
        return ""
    # SimpleITK hands over bytes that are no UTF-8 as lone surrogates.
    text = reader.GetMetaData(key).encode("utf-8", "replace").decode("utf-8")
    return " ".join(text.replace("\0", " ").split())


def _header(path: str) -> dict[str, Any]:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return {
        "size": reader.GetSize(),
        "spacing": reader.GetSpacing(),
        "components": reader.GetNumberOfComponents(),
        "dtype": _DTYPES.get(reader.GetPixelID(), ""),
        **{name: _tag(reader, key) for name, key in _TAGS.items()},
    }


def _voxels(names: list[str]) -> np.ndarray:
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(names)
    return sitk.GetArrayFromImage(reader.Execute())


def main() -> None:
    """Answers until stdin ends."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    # The stacks of threads count as memory, and a machine may have many cores.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    limited = hasattr(signal, "setitimer")
    out = sys.stdout.buffer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if limited:  # the default action of SIGPROF ends the process, in any C code
            signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
        _limit_memory(request["bytes"])
        array = None
        try:
            if "header" in request:
                reply = _header(request["header"])
            else:
                array = _voxels(request["voxels"])
                reply = {"dtype": array.dtype.str, "shape": array.shape}
        except (RuntimeError, MemoryError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            reply = {"error": text[-1].strip()}
        out.write(json.dumps(reply).encode() + b"\n")
        if array is not None:
            out.write(np.ascontiguousarray(array).data.cast("B"))
        out.flush()
        if limited:
            signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
