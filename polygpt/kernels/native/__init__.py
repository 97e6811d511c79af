"""What decoding computes on a CPU, in C++: products of a few rows with packed weights, and attention over a cache.

The source is compiled for this processor when it is first needed (8 s), with $CXX or the system's c++, and kept beside
JAX's compiled programs, or in the cache folder where JAX keeps none. Without a compiler, or with POLYGPT_NATIVE=0, XLA
computes the same, up to rounding, at half the speed or less (figures in benchmarks/README.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8, UInt16

from polygpt.cache import cache_folder, processor
from polygpt.kernels.cache import KVCache
from polygpt.kernels.scores import ScoreInputs, ScoreRule

SETTING = "POLYGPT_NATIVE"
FOLDER = Path(__file__).parent
TARGETS = ("polygpt_product", "polygpt_product_int4", "polygpt_attention")
# -ffp-contract: fuses products with sums where the source does not (`add_product` in vectors.h).
FLAGS = ("-O2", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-w")
SECONDS = 120  # that a compiler may take
DAY = 24 * 60 * 60
KEPT = 60 * DAY  # libraries that are not loaded
HEAD_DIM = 256  # of attention, at most (attention.h)

_lock = threading.Lock()


def available() -> bool:
    """Whether this can be used: on a CPU with a compiler."""
    return jax.default_backend() == "cpu" and unavailable() is None


def unavailable() -> str | None:
    """Compiles and registers it, once in a process; why that is not possible, or None."""
    with _lock:
        return _prepare()


@cache
def _prepare() -> str | None:
    if os.environ.get(SETTING) in ("", "0", "off"):
        return f"{SETTING}={os.environ[SETTING]}"
    try:
        compiler = _compiler()
    except FileNotFoundError as error:
        return str(error)
    try:
        library = _library(compiler)
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except subprocess.CalledProcessError as error:
        return f"{compiler[0]} failed: {(error.stderr.strip().splitlines() or ['no message'])[0]}"
    except subprocess.TimeoutExpired:
        return f"{compiler[0]} took more than {SECONDS} s"
    except (OSError, AttributeError) as error:
        return str(error)
    return None


def _compiler() -> list[str]:
    """The command: $CXX may be more than a name, as in CXX="ccache g++"."""
    name = os.environ.get("CXX", "").strip() or "c++"
    try:
        program, *flags = [name] if shutil.which(name) else shlex.split(name)
    except ValueError as error:  # quotation marks
        raise FileNotFoundError(f"CXX={name}: {error}") from None
    path = shutil.which(program)
    if path is None:
        raise FileNotFoundError(f"there is no C++ compiler: {program}" + ("" if "CXX" in os.environ else ", or $CXX"))
    return [path, *flags]


# Numbers of a matrix or of a stack of them; and a matrix in 4 bits: nibbles, step, zero and unit of `PackedInt4`.
Stack = Float[Array, "*stack _ I"] | Int8[Array, "*stack _ I"] | UInt16[Array, "*stack _ I"]
Int4 = tuple[UInt8[Array, "..."], UInt8[Array, "..."], UInt8[Array, "..."], Float[Array, "..."]]


def products(
    x: Float[Array, "M I"], matrices: Sequence[tuple[Stack, Array | None]], layer: Array | int | None
) -> list[Float[Array, "M _"]]:
    """`x` times the transpose of each of a layer's matrices: float32, int8 with a scale for each output, or the bits
    of bfloat16."""
    weights = [(values, jnp.zeros(0, jnp.float32) if scale is None else scale) for values, scale in matrices]
    return _multiply("polygpt_product", x, [values.shape[-2] for values, _ in matrices], weights, layer)


def products_int4(
    x: Float[Array, "M I"], matrices: Sequence[Int4], outputs: Sequence[int], layer: Array | int | None
) -> list[Float[Array, "M _"]]:
    """As `products`, for matrices in 4 bits, which have `outputs` outputs."""
    return _multiply("polygpt_product_int4", x, outputs, matrices, layer)


def cached_attention(
    q: Float[Array, "B T N H"],
    cache: KVCache,
    rule: ScoreRule,
    inputs: ScoreInputs,
    positions: Int[Array, "#B T"],
    last: Int[Array, "#B 1"],
    reach: Int[Array, ""],
) -> Float[Array, "B T N H"]:
    """See `cache_blocks.cached_attention`; float32, of a cache in float32 or bfloat16, without segments or dropout."""
    per_head = (
        jnp.zeros(0, jnp.float32) if each is None else each.astype(jnp.float32)
        for each in (inputs.slopes, inputs.sinks)
    )
    last = jnp.broadcast_to(last, (q.shape[0], 1))
    where = (each.astype(jnp.int32) for each in (positions, last, jnp.reshape(reach, 1)))
    call = jax.ffi.ffi_call("polygpt_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32), vmap_method="sequential")
    settings = {"scale": np.float32(rule.scale), "window": np.int64(rule.window or 0)}
    return call(
        q, cache.k, cache.v, *where, *per_head, _index(cache.layer), softcap=np.float32(rule.softcap or 0), **settings
    )


def _multiply(
    target: str, x: Array, outputs: Sequence[int], weights: Sequence[tuple[Array, ...]], layer: Array | int | None
) -> list[Array]:
    results = [jax.ShapeDtypeStruct((x.shape[0], count), jnp.float32) for count in outputs]
    arrays = [array for matrix in weights for array in matrix]
    return jax.ffi.ffi_call(target, results, vmap_method="sequential")(x, _index(layer), *arrays)


def _index(layer: Array | int | None) -> Int[Array, "1"]:
    return jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)


def _library(compiler: list[str]) -> ctypes.CDLL:
    """The compiled code, from the cache folder if it is there whole."""
    folder = _folder()
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return ctypes.CDLL(str(_compile(compiler, Path(temporary) / "native")))
    sources = [path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in (".h", ".cc")]
    made_from = [*sources, *(word.encode() for word in (*compiler, *FLAGS, processor(), jax.__version__))]
    name = f"native-{_digest(b'|'.join(made_from))}"
    whole = (file for file in folder.glob(f"{name}-*.so") if file.stem == f"{name}-{_digest(file.read_bytes())}")
    file = next(whole, None)
    if file is not None and not _is_newer(file, DAY):
        with suppress(OSError):
            os.utime(file)
    return ctypes.CDLL(str((file or _compile(compiler, folder / name)).absolute()))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _folder() -> Path | None:
    programs = jax.config.jax_compilation_cache_dir
    if not programs or "://" in programs:  # JAX can keep them elsewhere than in a folder
        return cache_folder()
    try:
        Path(programs).mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return Path(programs) if os.access(programs, os.W_OK | os.X_OK) else None


def _compile(compiler: list[str], stem: Path) -> Path:
    """Compiles to another name first, so that a process beside this one never loads a part of the file.

    Its name ends in a digest of what it holds: to load a library of which a part is lost can end the process.
    """
    _delete_old(stem.parent)
    too_slow = stem.with_name(f"{stem.name}.timeout")
    if _is_newer(too_slow, DAY):
        again = f"it is tried again a day later, or once {too_slow} is deleted"
        raise TimeoutError(f"{compiler[0]} took more than {SECONDS} s the last time; {again}")
    temporary = stem.with_name(f"{stem.name}.so.{secrets.token_hex(4)}")
    try:
        command = [*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(FOLDER / "handlers.cc"), "-o", str(temporary)]
        streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
        subprocess.run(command, check=True, timeout=SECONDS, **streams)
        file = stem.with_name(f"{stem.name}-{_digest(temporary.read_bytes())}.so")
        os.replace(temporary, file)
    except subprocess.TimeoutExpired:
        with suppress(OSError):
            too_slow.touch()
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _delete_old(folder: Path) -> None:
    """Deletes what killed processes left, timeouts that no longer count, and libraries that are not used any more."""
    for pattern, seconds in (("native-*.so.*", 2 * SECONDS), ("native-*.timeout", DAY), ("native-*.so", KEPT)):
        for file in folder.glob(pattern):
            if not _is_newer(file, seconds):
                with suppress(OSError):
                    file.unlink()


def _is_newer(file: Path, seconds: int) -> bool:
    try:
        return time.time() - file.stat().st_mtime < seconds
    except OSError:
        return False
