"""How long the parts of a microbatch take: matrix products by FLOPs, memory-bound ops by bytes, exchanges by latency
and bytes (alpha-beta).

Legend: T tokens of a microbatch on a rank, D model dim, F feed-forward dim, e bytes of an element. All sizes are a
rank's own share. The sums are those of `megacoder.model.scheduled`: what it exchanges during products costs only what
exceeds the time of these.
"""

from dataclasses import dataclass

from megacoder.train.planning.devices import Device, Shares
from megacoder.train.planning.job import Job, Variant

__all__ = ["Link", "PartTimes", "boundary_seconds", "head_seconds", "layer_times", "shard_link"]


@dataclass(frozen=True)
class PartTimes:
    """Seconds of one microbatch through a layer."""

    forward: float
    input_grad: float
    """recomputation included"""
    weight_grad: float


@dataclass(frozen=True)
class Link:
    """What ranks of a group exchange over: seconds = latency + bytes / rate."""

    latency: float
    bytes_per_second: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency + num_bytes / self.bytes_per_second


def link_between(device: Device, shares: Shares, *, size: int, inside: int) -> Link:
    """The link of a group of `size` ranks, `inside` of them on each node: a node's own, or a share of its network.

    A group with several ranks on a node sends each byte into the network once for all of them, over all their adapters;
    the groups of a node share its network.
    """
    in_node = device.node_gb_per_s * 1e9 * shares.links
    if inside >= size:
        return Link(device.node_latency_us * 1e-6, in_node)
    between = device.network_gb_per_s * 1e9 * shares.links * inside / device.devices_per_node
    return Link(device.network_latency_us * 1e-6, min(between, in_node) if inside > 1 else between)


def shard_link(variant: Variant, device: Device, shares: Shares) -> Link:
    """Among the ranks that ZeRO-1 shares an optimizer out to: data and context parallel ones."""
    dims, node = variant.dims, device.devices_per_node
    cp_inside = min(dims.cp, max(1, node // dims.tp))
    replica = dims.tp * dims.cp * (1 if variant.stage_per_node else dims.pp)
    inside = cp_inside * min(dims.dp, max(1, node // replica))
    return link_between(device, shares, size=dims.dp * dims.cp, inside=inside)


def layer_times(job: Job, variant: Variant, device: Device, shares: Shares) -> PartTimes:
    """Of one layer."""
    model, dims, e = job.model, variant.dims, job.itemsize
    tokens, rows = variant.tokens(job), variant.rows(job)
    tp, dim = dims.tp, model.hidden_size
    _, kv_heads, c, hk, ffn = model.local_sizes(tp)
    rate = _product_rate(variant, device, shares)

    def product(inner: int, outer: int) -> float:
        moved = e * (tokens * (inner + outer) + inner * outer)
        return 2.0 * tokens * inner * outer / rate + moved / _copy(device, shares)

    products = product(dim, c) + product(hk, dim) + product(dim, 2 * ffn) + product(ffn, dim)
    gate_up, down = product(dim, 2 * ffn), product(ffn, dim)
    attention = 2.0 * tokens * job.seq_length * hk / (device.matrix_tflops * 1e12 * shares.attention)  # causal
    norms = 8 * rows * dim * e / _copy(device, shares)
    rope = 2 * tokens * (c - kv_heads * model.head_dim) * e / _copy(device, shares)
    head_norms = tokens * model.normed_columns(tp) * e / _copy(device, shares)  # one pass; the rest is rope's
    swiglu = 3 * tokens * ffn * e / _copy(device, shares)
    exchange = _exchange(job, variant, device, shares)
    keys = _key_exchange(job, variant, device, shares)
    exposed = exchange * (1 - shares.hidden_exchange if variant.overlaps_exchange else 1.0)
    forward = products + attention + norms + rope + swiglu + 4 * exposed + keys
    # two gathers of gradients are waited for; sums and re-gathered inputs travel during the weight gradients
    input_grad = products + 2.5 * attention + norms + rope + head_norms + 2 * swiglu + 2 * exposed + keys
    if variant.recompute == "full":
        input_grad += forward - down - exposed
    elif variant.recompute == "selective":
        input_grad += gate_up + norms + 2 * head_norms
    elif variant.recompute == "norms":
        input_grad += norms + 2 * head_norms
    behind = max(0.0, 4 * exchange - products) if tp > 1 else 0.0
    return PartTimes(forward, input_grad + behind, products)


def head_seconds(job: Job, variant: Variant, device: Device, shares: Shares) -> float:
    """Of the last norm, the head, the loss and all of its gradients, which its forward computes (see
    `megacoder.model.stage`)."""
    columns = job.model.padded_vocab_size // variant.dims.tp
    tokens, dim, e = variant.tokens(job), job.model.hidden_size, job.itemsize
    products = 6.0 * tokens * columns * dim / (device.matrix_tflops * 1e12 * shares.products)
    moved = 6 * tokens * columns * e + 12 * variant.rows(job) * dim * e
    return products + moved / _copy(device, shares) + 2 * _exchange(job, variant, device, shares)


def boundary_seconds(job: Job, variant: Variant, device: Device, shares: Shares) -> float:
    """From one pipeline stage to the next; where some neighbours are on other nodes, those set the pace."""
    dims, node = variant.dims, device.devices_per_node
    stride = dims.tp * dims.cp
    crosses = variant.stage_per_node or stride * dims.pp > node
    link = link_between(device, shares, size=2, inside=1 if crosses else 2)
    if crosses and stride < node and not variant.stage_per_node:  # not all of a node's ranks send out of it at a time
        link = Link(link.latency, link.bytes_per_second * node / stride)
    return link.seconds(variant.rows(job) * job.model.hidden_size * job.itemsize)


def _product_rate(variant: Variant, device: Device, shares: Shares) -> float:
    if variant.fp8 and device.fp8_tflops is not None:
        return device.fp8_tflops * 1e12 * shares.fp8_products
    return device.matrix_tflops * 1e12 * shares.products


def _copy(device: Device, shares: Shares) -> float:
    return device.memory_gb_per_s * 1e9 * shares.copies


def _exchange(job: Job, variant: Variant, device: Device, shares: Shares) -> float:
    """One gather or scattered sum of the residual stream among tensor parallel ranks."""
    tp = variant.dims.tp
    if tp == 1:
        return 0.0
    link = link_between(device, shares, size=tp, inside=min(tp, device.devices_per_node))
    factor = 1 if variant.sequence_parallel else 2  # an all-reduce is both
    return link.seconds(factor * variant.tokens(job) * job.model.hidden_size * job.itemsize * (tp - 1) / tp)


def _key_exchange(job: Job, variant: Variant, device: Device, shares: Shares) -> float:
    """Keys and values of whole sequences, gathered among context parallel ranks."""
    dims = variant.dims
    if dims.cp == 1:
        return 0.0
    _, kv_heads = job.model.local_heads(dims.tp)
    link = link_between(device, shares, size=dims.cp, inside=min(dims.cp, max(1, device.devices_per_node // dims.tp)))
    own = 2 * variant.tokens(job) * kv_heads * job.model.head_dim * job.itemsize
    return link.seconds(own * (dims.cp - 1))
