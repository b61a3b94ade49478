"""Every test sees eight CPU devices."""

import jax

from deepseek_jax import enough_threads

enough_threads(8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
