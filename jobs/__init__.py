"""The runner: rows, files and processes. It knows no tensors.

manifest -> requests -> tasks -> batches -> shards -> workers -> results

request  a manifest row, as asked
task     one image to make, as resolved: every setting filled in, its seed known
batch    tasks that share one graph call and one sampler schedule
shard    a few batches, leased to one worker
worker   a process that owns one device
result   one row per task, whatever became of it
"""

__version__ = "0.1.0"
