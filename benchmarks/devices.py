"""The devices that programs are counted and compiled for: rates, memory, description.

Rates are their vendors', dense (without sparsity), per chip:

H200 SXM: https://www.nvidia.com/en-us/data-center/h200/ gives tensor core rates with
sparsity, which are halved here.
H100 SXM: https://www.nvidia.com/en-us/data-center/h100/ , halved as well.
A100 SXM 80 GB: https://www.nvidia.com/en-us/data-center/a100/
T4: https://www.nvidia.com/en-us/data-center/tesla-t4/ ; neither TF32 nor bfloat16.
TPU v5e: https://docs.cloud.google.com/tpu/docs/v5e
TPU v5p: https://docs.cloud.google.com/tpu/docs/v5p
TPU v6e: https://docs.cloud.google.com/tpu/docs/v6e

A TPU multiplies bfloat16. Float32 products take one pass of it by default, which keeps
8 bits of each factor, and six at full precision (jax.lax.Precision), as jaxreg asks for
in filters, resizing and generated heads. No rate of its vector unit is published: what
is no matrix product is counted by memory alone. So it is on a CPU.
"""

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Attributes:
      float32: operations per second in products at full precision.
      default: in products of float32 numbers as JAX does them unless told otherwise.
      bfloat16: in products of bfloat16 numbers.
      bandwidth: bytes per second of its main memory.
      vector: float32 operations per second outside products; None if not known.
      array: rows and columns of its matrix unit, 0 where small products fill it too.
    """

    float32: float
    default: float
    bfloat16: float
    bandwidth: float
    vector: float | None = None
    array: int = 0


DEVICES = {
    "nvidia-h200": Device(67e12, 494.5e12, 989.5e12, 4.8e12, 67e12),
    "nvidia-h100": Device(67e12, 494.5e12, 989.5e12, 3.35e12, 67e12),
    "nvidia-a100": Device(19.5e12, 156e12, 312e12, 2.039e12, 19.5e12),
    "nvidia-t4": Device(8.1e12, 8.1e12, 8.1e12, 320e9, 8.1e12),
    "tpu-v5e": Device(197e12 / 6, 197e12, 197e12, 819e9, array=128),
    "tpu-v5p": Device(459e12 / 6, 459e12, 459e12, 2765e9, array=128),
    "tpu-v6e": Device(918e12 / 6, 918e12, 918e12, 1638e9, array=256),
}

GIB = 2**30
GPU_SHARE = 0.75
"""Of a GPU's memory, what JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says more."""
Platform = Literal["tpu", "cuda", "cpu"]


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
      platform: whose compiler it takes.
      rates: of `DEVICES`; None where a bound would mean nothing.
      memory: bytes that a program may have; None if not known.
      clock: of a TPU's cores, cycles per second: the bfloat16 rate over what the matrix
        units do in a cycle.
      text: a GPU's description, a `stream_executor.GpuTargetConfigProto` as text.
    """

    platform: Platform
    rates: Device | None = None
    memory: float | None = None
    clock: float | None = None
    text: str = ""


def _gpu(name: str, memory: int, **numbers: Any) -> str:
    """Returns the description of a GPU, with what all those of interest share.

    Args:
      name: as the driver has it.
      memory: bytes.
      numbers: the other fields; "compute" is its capability, "9.0".
    """
    major, minor = numbers.pop("compute").split(".")
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "device_memory_size": memory,
        **numbers,
    }
    said = " ".join(f"{field}: {value}" for field, value in fields.items())
    said += f" cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f'gpu_device_info {{ {said} }} platform_name: "CUDA" '
        "dnn_version_info { major: 9 minor: 10 } "
        f'device_description_str: "{name}"'
    )


# Numbers of H100 and A100: xla/backends/gpu/target_config/specs of openxla/xla. It has
# none of the T4, whose numbers are the driver's.
_H100 = _gpu(
    "NVIDIA H100 80GB HBM3",
    84942979072,
    compute="9.0",
    core_count=132,
    fpus_per_core=128,
    clock_rate_ghz=1.98,
    threads_per_core_limit=2048,
    shared_memory_per_core=233472,
    shared_memory_per_block_optin=232448,
    l2_cache_size=52428800,
    memory_bandwidth=3352320000000,
)
_A100 = _gpu(
    "NVIDIA A100-SXM4-80GB",
    85100068864,
    compute="8.0",
    core_count=108,
    fpus_per_core=64,
    clock_rate_ghz=1.41,
    threads_per_core_limit=2048,
    shared_memory_per_core=167936,
    shared_memory_per_block_optin=166912,
    l2_cache_size=41943040,
    memory_bandwidth=2039040000000,
)
_T4 = _gpu(
    "Tesla T4",
    15837691904,
    compute="7.5",
    core_count=40,
    fpus_per_core=64,
    clock_rate_ghz=1.59,
    threads_per_core_limit=1024,
    shared_memory_per_core=65536,
    shared_memory_per_block_optin=65536,
    l2_cache_size=4194304,
    memory_bandwidth=320064000000,
)

# A TPU's memory is what its compiler says that a program may have.
TARGETS = {
    "v5e": Target("tpu", DEVICES["tpu-v5e"], 15.75 * GIB, 1.5e9),
    "v6e": Target("tpu", DEVICES["tpu-v6e"], 31.25 * GIB, 1.75e9),
    "v5p": Target("tpu", DEVICES["tpu-v5p"], 95.74 * GIB, 1.75e9),
    "t4": Target("cuda", DEVICES["nvidia-t4"], GPU_SHARE * 15837691904, text=_T4),
    "a100": Target("cuda", DEVICES["nvidia-a100"], GPU_SHARE * 85100068864, text=_A100),
    "h100": Target("cuda", DEVICES["nvidia-h100"], GPU_SHARE * 84942979072, text=_H100),
    "cpu": Target("cpu"),
}

_FLAT = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
_DEEP = {1: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
_GPU_OPTIONS = {
    # Without a device there is nothing to time kernels on.
    "xla_gpu_autotune_level": "0",
    "xla_gpu_enable_triton_gemm": False,
}


class NotThere(Exception):
    """A compiler or a group of devices is not there; the message says more."""


INSTALL = {
    "tpu": 'pip install -c constraints.txt -e ".[tpu-compile]"',
    "cuda": "pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION",
}
"""What makes the environment of a compiler; see benchmarks/README.md."""


def described(name: str, count: int = 1) -> tuple[list[Any], dict[str, Any]]:
    """Returns devices that need not be there, and options for their compiler.

    Args:
      name: in `TARGETS`.
      count: of devices.

    Raises:
      NotThere: the compiler is not installed, or makes no such group of devices.
    """
    import jax
    from jax.experimental import topologies

    target = TARGETS[name]
    if target.platform == "cpu":
        if count > len(jax.devices("cpu")):
            raise NotThere(
                f"this machine shows {len(jax.devices('cpu'))} CPU devices, {count} "
                f"are needed; set XLA_FLAGS to --xla_force_host_platform_device_count="
                f"{count}"
            )
        return jax.devices("cpu")[:count], {}
    if target.platform == "cuda":
        _import_compiler("jax_plugins.xla_cuda12", "cuda")
        found = topologies.get_topology_desc(
            name, "cuda", target_config=target.text, topology=f"1x1x{count}"
        )
        return list(found.devices), _GPU_OPTIONS
    _import_compiler("libtpu", "tpu")
    shapes = _DEEP if name == "v5p" else _FLAT
    if count not in shapes:
        raise NotThere(
            f"{name} is described with {', '.join(map(str, shapes))} chips, got {count}"
        )
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{name}:{shapes[count]}"
    )
    return list(found.devices)[:count], {}


def _import_compiler(module: str, platform: str) -> None:
    """Imports a compiler; it registers itself, perhaps for the second time."""
    import importlib

    import jax

    try:
        importlib.import_module(module)
    except ImportError as error:
        line = INSTALL[platform].replace("VERSION", jax.__version__)
        raise NotThere(
            f"the {platform.upper()} compiler is not installed ({error}); "
            f"`{line}` in an environment of its own brings it"
        ) from None
