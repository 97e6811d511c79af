"""How XLA compiles in tests: models this small take fifty times longer to optimise than to run."""

from importlib.metadata import version

# Settings that are quick, and those that XLA takes by itself.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_cpu_parallel_codegen_split_count": 32}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones end the process at a flag they do not know
    QUICK["xla_cpu_use_fusion_emitters"] = False
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
