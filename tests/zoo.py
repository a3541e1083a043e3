"""Small networks of every kind, to find units in and to shrink."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

F32 = jnp.float32


def randomized(tree, seed=0):
    """The tree with other values: none is zero, so that nothing hides a difference."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.uniform(0.3, 1.0, leaf.shape)
        if "var" not in jax.tree_util.keystr(path):
            value *= rng.choice([-1, 1], leaf.shape)
        return np.asarray(value, np.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def sample(shape, dtype=F32, seed=1):
    if dtype == jnp.int32:
        return jnp.asarray(np.random.default_rng(seed).integers(0, 5, shape), dtype)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def removed(units, params, gone):
    """The parameters without the units that are marked, one bool array a family."""
    leaves, treedef = jax.tree.flatten(params)
    kept = [[np.ones(n, bool) for n in leaf.shape] for leaf in leaves]
    for family, marks in zip(units.families, gone, strict=True):
        for part in family.slices:
            kept[part.leaf][part.axis][part.indices[marks]] = False
    small = [
        leaf[np.ix_(*keep)] if keep else leaf
        for leaf, keep in zip(leaves, kept, strict=True)
    ]
    return jax.tree.unflatten(treedef, small)


# Each returns fn(params, *inputs), params, inputs, and a fn for fewer units where fn
# itself keeps its sizes.


def of_nnx(make, *inputs):
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    fn = lambda params, *inputs: nnx.merge(graph, params)(*inputs)
    return fn, randomized(state), inputs


def of_equinox(make, *inputs):
    module = eqx.filter_eval_shape(make, jax.random.key(0))
    is_array = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    params, static = eqx.partition(module, is_array)
    fn = lambda params, *inputs: eqx.combine(params, static)(*inputs)
    return fn, randomized(params), inputs


def of_linen(build, *inputs):
    """A network whose module is built from the sizes of its parameters."""
    params = jax.eval_shape(build(None).init, jax.random.key(0), *inputs)
    fn = lambda params, *inputs: build(params).apply(params, *inputs)
    return fn, randomized(params), inputs


def mlp():
    def fn(params, x):
        x = jax.nn.gelu(x @ params["w1"] + params["b1"])
        x = jnp.tanh(x @ params["w2"] + params["b2"])
        return x @ params["w3"]

    shapes = {"w1": (3, 6), "b1": (1, 6), "w2": (6, 5), "b2": (1, 5), "w3": (5, 2)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return fn, randomized(params), (sample((4, 3)),)


def mlp_equinox():
    make = lambda key: eqx.nn.MLP(3, 2, 7, 2, key=key)
    return of_equinox(make, sample((3,)))


def lenet():
    class LeNet(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(1, 4, (5, 5), padding="VALID", rngs=rngs)
            self.conv2 = nnx.Conv(4, 6, (5, 5), padding="VALID", rngs=rngs)
            self.dense1 = nnx.Linear(4 * 4 * 6, 12, rngs=rngs)
            self.dense2 = nnx.Linear(12, 8, rngs=rngs)
            self.dense3 = nnx.Linear(8, 10, rngs=rngs)

        def __call__(self, x):
            for conv in (self.conv1, self.conv2):
                x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
            x = x.reshape(x.shape[0], -1)
            return self.dense3(nnx.relu(self.dense2(nnx.relu(self.dense1(x)))))

    return of_nnx(LeNet, sample((2, 28, 28, 1)))


def resnet():
    class ResNet(nn.Module):
        widths: tuple

        @nn.compact
        def __call__(self, x):
            conv = lambda n, k=3, s=1: nn.Conv(n, (k, k), s, use_bias=False)
            norm = lambda x: nn.BatchNorm(use_running_average=True)(x)
            stem, mid1, mid2, out = self.widths
            x = nn.relu(norm(conv(stem)(x)))
            y = nn.relu(norm(conv(mid1)(x)))
            x = nn.relu(x + norm(conv(stem)(y)))
            y = nn.relu(norm(conv(mid2, s=2)(x)))
            x = nn.relu(norm(conv(out, 1, 2)(x)) + norm(conv(out)(y)))
            return nn.Dense(3)(x.mean((1, 2)))

    def build(variables):
        if variables is None:
            return ResNet((4, 5, 6, 8))
        width = lambda i: variables["params"][f"Conv_{i}"]["kernel"].shape[-1]
        return ResNet((width(0), width(1), width(3), width(4)))

    return of_linen(build, sample((2, 8, 8, 3)))


def densenet():
    class DenseNet(nnx.Module):
        def __init__(self, rngs):
            conv = lambda a, b: nnx.Conv(a, b, (3, 3), rngs=rngs)
            norm = lambda n: nnx.BatchNorm(n, use_running_average=True, rngs=rngs)
            self.stem, self.conv1, self.conv2 = conv(1, 4), conv(4, 3), conv(7, 5)
            self.norm1, self.norm2 = norm(4), norm(7)
            self.head = nnx.Linear(12, 2, rngs=rngs)

        def __call__(self, x):
            x = self.stem(x)
            x = jnp.concatenate([x, self.conv1(nnx.relu(self.norm1(x)))], -1)
            x = jnp.concatenate([x, self.conv2(nnx.relu(self.norm2(x)))], -1)
            return self.head(x.mean((1, 2)))

    return of_nnx(DenseNet, sample((2, 6, 6, 1)))


def depthwise_separable():
    class Net(nn.Module):
        widths: tuple

        @nn.compact
        def __call__(self, x):
            first, second = self.widths
            x = nn.relu(nn.Conv(first, (3, 3))(x))
            x = nn.relu(nn.Conv(2 * first, (3, 3), feature_group_count=first)(x))
            x = nn.relu(nn.Conv(second, (1, 1))(x))
            return nn.Dense(2)(x.mean((1, 2)))

    def build(variables):
        if variables is None:
            return Net((4, 6))
        width = lambda i: variables["params"][f"Conv_{i}"]["kernel"].shape[-1]
        return Net((width(0), width(2)))

    return of_linen(build, sample((2, 6, 6, 3)))


def group_norm():
    """Whole groups of channels are units; the module keeps their number."""

    class Net(nn.Module):
        groups: int

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(2 * self.groups, (3, 3))(x)
            x = nn.relu(nn.GroupNorm(self.groups)(x))
            return nn.Dense(2)(x.mean((1, 2)))

    fn, params, inputs = of_linen(lambda _: Net(4), sample((2, 6, 6, 3)))

    def small_fn(params, x):
        width = params["params"]["Dense_0"]["kernel"].shape[0]
        return Net(width // 2).apply(params, x)

    return fn, params, inputs, small_fn


def attention_linen():
    class Net(nn.Module):
        heads: int

        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(
                self.heads, qkv_features=3 * self.heads
            )(x)
            return nn.Dense(2)(x)

    fn, params, inputs = of_linen(lambda _: Net(4), sample((2, 5, 6)))

    def small_fn(params, x):
        (attention,) = (v for k, v in params["params"].items() if "Multi" in k)
        return Net(len(attention["out"]["kernel"])).apply(params, x)

    return fn, params, inputs, small_fn


def convolve(x, kernel, groups=1):
    spec = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups
    )


def grouped_convolution():
    def fn(params, x):
        x = jax.nn.relu(convolve(x, params["narrow"]))
        groups = x.shape[-1] // params["grouped"].shape[2]
        x = jax.nn.relu(convolve(x, params["grouped"], groups))
        return convolve(x, params["wide"])

    shapes = {"narrow": (1, 1, 3, 6), "grouped": (3, 3, 2, 12), "wide": (1, 1, 12, 3)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return fn, randomized(params), (sample((1, 5, 5, 3)),)


def unet():
    class UNet(nnx.Module):
        def __init__(self, rngs):
            conv = lambda a, b: nnx.Conv(a, b, (3, 3), rngs=rngs)
            self.down1, self.down2, self.middle = conv(2, 4), conv(4, 5), conv(5, 6)
            self.up2 = nnx.ConvTranspose(6, 5, (2, 2), (2, 2), rngs=rngs)
            self.conv2 = conv(5 + 5, 4)
            self.conv1 = conv(4 + 4, 3)
            self.out = conv(3, 2)

        def __call__(self, x):
            one = nnx.relu(self.down1(x))
            two = nnx.relu(self.down2(nnx.avg_pool(one, (2, 2), (2, 2))))
            x = nnx.relu(self.middle(nnx.max_pool(two, (2, 2), (2, 2))))
            x = self.conv2(jnp.concatenate([two, self.up2(x)], -1))
            n, h, w, c = x.shape
            x = jax.image.resize(x, (n, 2 * h, 2 * w, c), "bilinear")
            return self.out(nnx.relu(self.conv1(jnp.concatenate([one, x], -1))))

    return of_nnx(UNet, sample((1, 8, 8, 2)))


def transformer():
    class Block(nnx.Module):
        def __init__(self, heads, rngs):
            self.norm1, self.norm2 = (nnx.LayerNorm(8, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(
                heads, 8, 3 * heads, decode=False, rngs=rngs
            )
            self.dense1 = nnx.Linear(8, 10, rngs=rngs)
            self.dense2 = nnx.Linear(10, 8, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.dense2(nnx.gelu(self.dense1(self.norm2(x))))

    class Transformer(nnx.Module):
        def __init__(self, rngs, heads=(4, 4)):
            self.embed = nnx.Embed(5, 8, rngs=rngs)
            self.position = nnx.Param(jnp.zeros((6, 8)))
            self.block1, self.block2 = (Block(n, rngs) for n in heads)
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens) + self.position[None, : tokens.shape[1]]
            return self.head(self.block2(self.block1(x)))

    def small_fn(params, tokens):
        """The module of attention keeps its number of heads, so it is another one."""
        heads = [params[f"block{i}"]["attention"]["out"]["kernel"] for i in (1, 2)]
        make = lambda: Transformer(nnx.Rngs(0), [x.shape[0] for x in heads])
        graph, _ = nnx.split(nnx.eval_shape(make))
        return nnx.merge(graph, params)(tokens)

    return *of_nnx(Transformer, sample((2, 6), jnp.int32)), small_fn


def grouped_query_attention_and_glu():
    """Fused kernels, split heads, RMSNorm, rotary embedding, a causal mask."""

    def norm(x, scale):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    def rotary(x):
        half = x.shape[-1] // 2
        angles = (
            jnp.arange(x.shape[1], dtype=F32)[:, None] * 0.1 ** jnp.arange(half)[None]
        )
        sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def fn(params, x):
        b, t, _ = x.shape
        y = norm(x, params["norm1"])
        q = rotary((y @ params["q"]).reshape(b, t, -1, 4))
        k, v = jnp.split(y @ params["kv"], 2, -1)
        k, v = rotary(k.reshape(b, t, -1, 4)), v.reshape(b, t, -1, 4)
        k, v = (jnp.repeat(z, q.shape[2] // z.shape[2], 2) for z in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool))[None, None], scores, -1e9)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + y.reshape(b, t, -1) @ params["o"]
        gate, up = jnp.split(norm(x, params["norm2"]) @ params["gate_up"], 2, -1)
        return x + (jax.nn.silu(gate) * up) @ params["down"]

    shapes = {
        **{"q": (6, 24), "kv": (6, 24), "o": (24, 6), "norm1": (1, 1, 6)},
        **{"gate_up": (6, 14), "down": (7, 6), "norm2": (1, 1, 6)},
    }
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return fn, randomized(params), (sample((2, 5, 6)),)


def tied_embeddings():
    def fn(params, tokens):
        x = params["embed"][tokens]
        x = x + jax.nn.relu(x @ params["up"]) @ params["down"]
        return x @ params["embed"].T

    shapes = {"embed": (5, 6), "up": (6, 8), "down": (8, 6)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return fn, randomized(params), (sample((2, 3), jnp.int32),)


def scanned_linen():
    class Block(nn.Module):
        mid: int

        @nn.compact
        def __call__(self, x, _):
            y = nn.gelu(nn.Dense(self.mid)(x))
            return x + nn.Dense(x.shape[-1])(y), None

    class Net(nn.Module):
        widths: tuple

        @nn.compact
        def __call__(self, x):
            stream, mid = self.widths
            scan = nn.scan(
                nn.checkpoint(Block),
                {"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = scan(mid, name="blocks")(nn.Dense(stream)(x), None)
            return nn.Dense(2)(x)

    def build(variables):
        if variables is None:
            return Net((5, 7))
        blocks = variables["params"]["blocks"]["Dense_0"]["kernel"]
        return Net(blocks.shape[1:])

    return of_linen(build, sample((2, 3)))


def scanned_nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(4, rngs=rngs)
            self.up, self.down = (
                nnx.Linear(4, 6, rngs=rngs),
                nnx.Linear(6, 4, rngs=rngs),
            )

        def __call__(self, x):
            return x + self.down(nnx.silu(self.up(self.norm(x))))

    class Net(nnx.Module):
        def __init__(self, rngs):
            make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))
            self.blocks = make(rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            step = nnx.scan(
                lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return self.head(step(x, self.blocks))

    fn, params, inputs = of_nnx(Net, sample((2, 4)))
    return fn, params, inputs


def lstm_equinox():
    class Net(eqx.Module):
        cell: eqx.nn.LSTMCell
        head: eqx.nn.Linear

        def __call__(self, xs):
            size = self.cell.weight_hh.shape[1]
            carry = jnp.zeros(size), jnp.zeros(size)
            carry, _ = lax.scan(lambda c, x: (self.cell(x, c), None), carry, xs)
            return self.head(carry[0])

    make = lambda key: Net(eqx.nn.LSTMCell(3, 5, key=key), eqx.nn.Linear(5, 2, key=key))
    return of_equinox(make, sample((4, 3)))


def lstm_linen():
    """Its modules keep their sizes: it is built anew for fewer units."""

    class Net(nn.Module):
        size: int

        @nn.compact
        def __call__(self, xs):
            return nn.Dense(2)(nn.RNN(nn.OptimizedLSTMCell(self.size))(xs)[:, -1])

    fn, params, inputs = of_linen(lambda _: Net(5), sample((2, 4, 3)))

    def small_fn(params, xs):
        size = params["params"]["Dense_0"]["kernel"].shape[0]
        return Net(size).apply(params, xs)

    return fn, params, inputs, small_fn


def checkpointed():
    @jax.checkpoint
    def block(params, x):
        return x + jax.nn.swish(x @ params["up"]) @ params["down"]

    def fn(params, x):
        x = x @ params["in"]
        for i in range(2):
            x = jax.jit(block)(params[f"block{i}"], x)
        return x @ params["out"]

    block_shapes = {"up": (4, 6), "down": (6, 4)}
    shapes = {
        "in": (3, 4),
        "block0": block_shapes,
        "block1": block_shapes,
        "out": (4, 2),
    }
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return fn, randomized(params), (sample((2, 3)),)


def branches():
    """Two branches with kernels of their own, a custom derivative, a bottleneck."""

    @jax.custom_vjp
    def activate(x):
        return jnp.maximum(x, 0)

    activate.defvjp(lambda x: (activate(x), x), lambda x, g: (jnp.where(x > 0, g, 0),))

    def fn(params, x, flag):
        x = activate(x @ params["in"])
        run = lambda name: lambda x: activate(x @ params[name]) @ params["join"]
        x = lax.cond(flag, run("a"), run("b"), x)
        return x @ params["out"]

    shapes = {"in": (3, 4), "a": (4, 6), "b": (4, 6), "join": (6, 5), "out": (5, 2)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return fn, randomized(params), (sample((2, 3)), jnp.asarray(True))


def random_program(seed):
    """A network of random operations on the last axis, and its parameters."""
    rng = np.random.default_rng(seed)
    params, steps, widths = {}, [], [3]

    def weight(*shape):
        name = f"{len(params)}"
        params[name] = np.zeros(shape, np.float32)
        return name

    def dense(n):
        name = weight(n, width := int(rng.choice([4, 6, 8])))
        return width, lambda p, h, old: h @ p[name]

    def bias(n):
        name = weight(1, n)
        return n, lambda p, h, old: h + p[name]

    def scale(n):
        name = weight(1, n)
        return n, lambda p, h, old: h * p[name]

    def activate(n):
        names = [jnp.tanh, jax.nn.relu, jax.nn.sigmoid, jnp.cos, jax.nn.gelu]
        function = names[rng.integers(len(names))]
        return n, lambda p, h, old: function(h)

    def earlier(n):
        same = [i for i, m in enumerate(widths) if m == n]
        i, multiply = same[rng.integers(len(same))], rng.random() < 0.5
        return n, lambda p, h, old: h * old[i] if multiply else h + old[i]

    def concatenate(n):
        i = rng.integers(len(widths))
        return n + widths[i], lambda p, h, old: jnp.concatenate([h, old[i]], -1)

    def half(n):
        part, written = int(rng.integers(2)), rng.random() < 0.5
        cut = lambda h: n // 2 if written else h.shape[-1] // 2
        if part:
            return n - n // 2, lambda p, h, old: h[:, cut(h) :]
        return n // 2, lambda p, h, old: h[:, : cut(h)]

    def swap(n):
        a = 2 if n % 2 == 0 else 1
        outer = rng.random() < 0.5
        shape = lambda h: (2, -1, a) if outer else (2, a, -1)
        move = lambda h: h.reshape(shape(h)).swapaxes(1, 2).reshape(2, -1)
        return n, lambda p, h, old: move(h)

    def pairs(n):
        if n % 2:
            return n, lambda p, h, old: h
        return n // 2, lambda p, h, old: h.reshape(2, -1, 2).max(-1)

    def mixed(n):
        kind = rng.integers(6)
        return n, lambda p, h, old: (
            h[:, ::-1],
            jnp.cumsum(h, -1),
            h - h.mean(-1, keepdims=True),
            jnp.roll(h, 1, -1),
            h / h.shape[-1],
            h @ h.T @ h,
        )[kind]

    def square(n):
        name = weight(n, n)
        return n, lambda p, h, old: h + h @ (p[name].T if n % 4 else p[name])

    kinds = [dense, dense, dense, bias, scale, activate, activate, earlier]
    kinds += [concatenate, half, swap, pairs, mixed, square]
    for kind in [dense, *rng.choice(np.array(kinds, object), 8), dense]:
        width, step = kind(widths[-1])
        if not 2 <= width <= 16:
            continue
        widths.append(width)
        steps.append(step)
    last = weight(widths[-1], 3)

    def fn(params, x):
        old = [x]
        for step in steps:
            old.append(step(params, old[-1], old))
        return old[-1] @ params[last]

    return fn, randomized(params, seed), (sample((2, 3)),)
