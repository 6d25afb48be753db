"""find_lr leaves no trace: training after it equals training without it, to the last bit, whatever it was given."""

import copy
import functools
import inspect
import itertools
import json
import random
from collections import Counter, OrderedDict, UserDict, deque, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attn_cifar.core import InputError
from attn_cifar.data import load_data
from attn_cifar.lr_finder import LRRangeTest, find_lr
from attn_cifar.lr_finder.steps import logits_of
from attn_cifar.training import TrainingState
from torch import nn

POINTS = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
CLASSES = (POINTS[:, 0] > 0).long() + (POINTS[:, 1] > 0).long()
PAIRS = [(POINTS[i:i + 16], CLASSES[i:i + 16]) for i in range(0, 96, 16)]
SHORT = {"num_steps": 10, "trials": 1, "budget": 1e-9, "precision": "float32"}


def network() -> nn.Sequential:
    """A small network with two-dimensional weights, batch normalization and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def train(model, optimizer, batches, scheduler=None, create_graph=False) -> list[torch.Tensor]:
    """Train on the batches; return the weights, buffers and losses."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward(create_graph=create_graph)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.detach())
    return [*losses, *(value.clone() for value in model.state_dict().values())]


def compare(make_optimizer, *, make_model=network, warm=True, schedule=True, create_graph=False, **options) -> None:
    """Train four steps, run find_lr or nothing, attach a scheduler, train four more: the same bits."""
    results = []
    for ask in (False, True):
        model = make_model()
        optimizer = make_optimizer(model)
        if hasattr(optimizer, "train"):
            optimizer.train()
        start = train(model, optimizer, PAIRS[:4], create_graph=create_graph) if warm else []
        containers = [optimizer.param_groups, *optimizer.param_groups, optimizer.state]
        if ask:
            find_lr(model, PAIRS, optimizer, **SHORT | options)
            now = [optimizer.param_groups, *optimizer.param_groups, optimizer.state]
            if type(optimizer).__module__.startswith("torch.optim"):
                assert all(a is b for a, b in zip(containers, now, strict=True))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) if schedule else None
        end = train(model, optimizer, PAIRS[2:], scheduler, create_graph=create_graph)
        results.append([*start, *end, torch.tensor([float(group["lr"]) for group in optimizer.param_groups])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Optimizers

def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), 0.01, amsgrad=True),
    "Adam fused": lambda m: torch.optim.Adam(m.parameters(), 0.01, fused=True),
    "Adam tensor lr": lambda m: torch.optim.Adam(m.parameters(), torch.tensor(0.01)),
    "SGD groups": lambda m: torch.optim.SGD([{"params": m[0].parameters(), "lr": 0.1}, {"params": m[4].parameters()}], 0.01),
    "SparseAdam": None}
OPTIMIZERS |= {name: functools.partial(lambda kind, m: kind(m.parameters(), lr=0.01), getattr(torch.optim, name))
               for name in ("AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")}
for name in ("Adafactor", "Muon"):
    if hasattr(torch.optim, name):
        OPTIMIZERS[name] = functools.partial(lambda kind, m: kind(matrices(m), lr=0.01), getattr(torch.optim, name))


class SparseNetwork(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(4, 6, sparse=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.embedding((x[:, 0] > 0).long()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_find_lr_is_training_without_it(name):
    if name == "SparseAdam":
        compare(lambda m: torch.optim.SparseAdam(m.embedding.parameters(), lr=0.01), make_model=SparseNetwork)
    else:
        compare(OPTIMIZERS[name])


def timm_names():
    timm_optim = pytest.importorskip("timm.optim")
    return timm_optim, timm_optim.list_optimizers()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", ["lookahead_adamw", "lookahead_sgd",
                                  "lamb", "lion", "lars", "nadamw", "adan", "adabelief",
                                  "adahessian", "novograd", "sgdp", "madgrad", "nadam", "cadamw", "adopt", "mars", "radabelief",
                                  "muon"])
def test_optimizers_of_timm(name):
    timm_optim, names = timm_names()
    base = name.removeprefix("lookahead_")
    if base not in names:
        pytest.skip(f"this timm has no {base}")
    second, wraps = name == "adahessian", name.startswith("lookahead")
    for warm in True, False:
        compare(lambda m: timm_optim.create_optimizer_v2(m, name, lr=0.01), create_graph=second, warm=warm,
                schedule=warm and not wraps)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Using backward")
def test_all_optimizers_of_timm():
    timm_optim, names = timm_names()
    refused = []
    for name in names:
        if name.startswith(("bnb", "fused")):  # they need a GPU
            continue
        try:
            compare(lambda m, name=name: timm_optim.create_optimizer_v2(m, name, lr=0.01), create_graph=name == "adahessian")
        except InputError as error:
            refused.append((name, str(error)))
        except ImportError:  # an optional package
            continue
    assert all("closure" in words for _, words in refused)


# Wrappers, rebuilt from their public pattern

class Shared(torch.optim.Optimizer):
    """Like timm's Lookahead and apex's LARC: it shares the groups and the state of the one inside."""

    def __init__(self, base):
        self.base_optimizer, self.defaults, self.state, self.param_groups = base, base.defaults, base.state, base.param_groups
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    def step(self, closure=None):
        return self.base_optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.base_optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state):
        self.base_optimizer.load_state_dict(state)
        self.param_groups = self.base_optimizer.param_groups


class Lookahead(Shared):
    """It keeps slow weights in the state and counts steps in the groups."""

    def step(self, closure=None):
        result = self.base_optimizer.step(closure)
        for group in self.param_groups:
            group["lookahead_step"] = group.get("lookahead_step", 0) + 1
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                if group["lookahead_step"] % 3 == 0:
                    slow.add_(p.detach() - slow, alpha=0.5)
                    p.data.copy_(slow)
        return result


class Properties(torch.optim.Optimizer):
    """Like accelerate's: properties that read the one inside, without setters; `step` returns nothing."""

    def __init__(self, base):
        self.optimizer, self.calls = base, 0

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        self.calls += 1
        self.optimizer.step()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad()

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


class Several(torch.optim.Optimizer):
    """Two optimizers side by side, in a list; no state of its own can be loaded."""

    def __init__(self, *parts):
        self.optims, self.defaults = list(parts), {}

    param_groups = property(lambda self: [group for part in self.optims for group in part.param_groups])
    state = property(lambda self: {p: s for part in self.optims for p, s in part.state.items()})

    def step(self, closure=None):
        for part in self.optims:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.optims:
            part.zero_grad()

    def state_dict(self):
        raise NotImplementedError

    load_state_dict = state_dict


class Forgetful(Shared):
    """A wrapper whose `load_state_dict` leaves its own groups behind."""

    def load_state_dict(self, state):
        self.base_optimizer.load_state_dict(state)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD: a step outside of its training mode is refused; weights differ between the modes."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def _switch(self, training):
        for group in self.param_groups:
            if group["train_mode"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                        p.data.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = training

    def train(self):
        self._switch(True)

    def eval(self):
        self._switch(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise Exception("Optimizer was not in train mode when step is called.")
            weight = 1 / (group["k"] + 1)
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, weight)
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - weight) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


class SecondOrder(torch.optim.SGD):
    """It needs the graph of the gradients and says so only when it steps."""

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        if any(g.grad_fn is None for g in gradients):
            raise RuntimeError("Gradient tensor does not have grad_fn. Set the option create_graph to True.")
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad.detach())


class Slots(torch.optim.SGD):
    """An optimizer with a counter in slots."""

    __slots__ = ("count",)

    def step(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        for group in self.param_groups:
            group["lr"] /= self.count
        return super().step(closure)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.01)


WRAPPERS = {
    "shared": lambda m: Shared(sgd(m)), "lookahead": lambda m: Lookahead(adam(m)), "nested": lambda m: Shared(Lookahead(adam(m))),
    "properties": lambda m: Properties(adam(m)), "properties around lookahead": lambda m: Properties(Lookahead(sgd(m))),
    "forgetful": lambda m: Forgetful(adam(m)), "schedule-free": lambda m: ScheduleFree(m.parameters()),
    "slots": lambda m: Slots(m.parameters()),
    "several": lambda m: Several(torch.optim.SGD(m[0].parameters(), 0.1), torch.optim.Adam(m[4].parameters(), 0.01))}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("warm", [True, False])
def test_optimizers_around_optimizers(name, warm):
    make = WRAPPERS[name]
    compare(make, warm=warm, schedule=name not in ("several",))
    if name == "slots":
        return
    model = network()
    optimizer = make(model)
    if hasattr(optimizer, "train"):
        optimizer.train()
    find_lr(model, PAIRS, optimizer, **SHORT)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(POINTS), CLASSES).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "its groups have no effect any more"


@pytest.mark.parametrize("name", ["shared", "lookahead", "properties", "forgetful"])
def test_a_state_is_loaded_into_the_groups_that_wrappers_share(name):
    model = network()
    optimizer = WRAPPERS[name](model)
    inner = getattr(optimizer, "base_optimizer", getattr(optimizer, "optimizer", None))
    group, state = optimizer.param_groups[0], TrainingState(model, optimizer=optimizer)
    before = state.capture()
    train(model, optimizer, PAIRS)
    state.restore(before)
    assert optimizer.param_groups[0] is inner.param_groups[0] is group and optimizer.state is inner.state and not inner.state


@pytest.mark.filterwarnings("ignore:Using backward")
def test_second_order_optimizers_get_the_graph_of_the_gradients():
    compare(lambda m: SecondOrder(m.parameters(), 0.01), create_graph=True)


def test_a_scheduler_attached_before_keeps_its_patched_step():
    results = []
    for ask in (False, True):
        model = network()
        optimizer = Lookahead(sgd(model))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer.base_optimizer, 0.1, total_steps=20)
        counts = Counter()
        hook = optimizer.base_optimizer.register_step_post_hook(lambda *_, counts=counts: counts.update(steps=1))
        step = optimizer.base_optimizer.step
        train(model, optimizer, PAIRS[:3], scheduler)
        if ask:
            find_lr(model, PAIRS, optimizer, **SHORT)
        assert optimizer.base_optimizer.step is step or optimizer.base_optimizer.step == step
        results.append([*train(model, optimizer, PAIRS, scheduler), torch.tensor(scheduler.get_last_lr())])
        assert counts["steps"] == 9
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Closures

class Sam(torch.optim.Optimizer):
    """It shares its groups with a base optimizer and needs a closure."""

    def __init__(self, params, how):
        super().__init__(params, {"lr": 0.1})
        self.base_optimizer, self.how = torch.optim.SGD(self.param_groups, lr=0.1), how
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        if self.how == "assert":
            assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"
        elif self.how == "bare":
            assert closure is not None
        elif self.how == "raise":
            raise NotImplementedError("SAM has first_step and second_step")
        elif self.how == "value":
            raise ValueError("[-] SAM requires closure\nsee its documentation")
        closure()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.base_optimizer.param_groups = self.param_groups


@pytest.mark.parametrize("how", ["assert", "bare", "raise", "value", "call", "LBFGS", "LBFGS inside", "inside"])
def test_optimizers_that_need_a_closure_are_refused(how):
    model = network()
    wrapped = {"LBFGS": lambda: torch.optim.LBFGS(model.parameters()),
               "LBFGS inside": lambda: Shared(torch.optim.LBFGS(model.parameters())),
               "inside": lambda: Properties(Sam(model.parameters(), "assert"))}
    optimizer = wrapped[how]() if how in wrapped else Sam(model.parameters(), how)
    before, group, numbers = copy.deepcopy(model.state_dict()), optimizer.param_groups[0], torch.get_rng_state()
    with pytest.raises(InputError, match="needs a closure") as error:
        find_lr(model, PAIRS, optimizer, **SHORT)
    assert "\n" not in str(error.value) and torch.equal(numbers, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.param_groups[0] is group and all(p.grad is None for p in model.parameters())
    inner = getattr(optimizer, "base_optimizer", optimizer)
    assert inner.param_groups[0] is group and not hasattr(optimizer, "calls") or optimizer.__dict__.get("calls") == 0


# Loaders

class Noisy(torch.utils.data.Dataset):
    """Augments by chance, from several kinds of generators."""

    def __init__(self):
        self.numbers, self.python, self.torch = np.random.default_rng(0), random.Random(0), torch.Generator().manual_seed(0)
        self.served, self.cache, self.table = 0, {}, np.zeros(4)

    def __len__(self):
        return 64

    def __getitem__(self, i):
        self.served += 1
        self.table[i % 4] += 1
        self.cache.setdefault(i, self.served)
        noise = self.numbers.random() + self.python.random() + np.random.rand() + random.random()
        noise += torch.rand((), generator=self.torch)
        return POINTS[i] + noise + self.served + self.cache[i] + torch.rand(6), CLASSES[i]


class Stream(torch.utils.data.IterableDataset):
    """A stream with its own random numbers and a counter."""

    def __init__(self):
        self.numbers, self.epoch = np.random.default_rng(0), 0

    def __iter__(self):
        self.epoch += 1
        for i in self.numbers.permutation(96):
            yield POINTS[i] + self.epoch, CLASSES[i]


class Broken(Noisy):
    """It defines `state_dict` and cannot provide one."""

    def state_dict(self):
        raise NotImplementedError

    def load_state_dict(self, state):
        raise NotImplementedError


class Wrapped:
    """A loader around a loader, with a prefetching generator that is closed late."""

    def __init__(self, loader):
        self.loader, self.passes, self.open = loader, 0, 0

    def __len__(self):
        return len(self.loader)

    def state_dict(self):
        return None

    def load_state_dict(self, state):
        raise AssertionError

    def __iter__(self):
        self.passes, self.open = self.passes + 1, self.open + 1
        try:
            for x, y in self.loader:
                yield x + self.passes, y
        finally:
            self.open -= 1


class Epochs(torch.utils.data.Sampler):
    """A sampler whose order depends on a counter."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 64

    def __iter__(self):
        self.epoch += 1
        return iter(np.random.default_rng(self.epoch).permutation(64).tolist())


def loader(dataset=None, **options):
    return torch.utils.data.DataLoader(dataset or Noisy(), **{"batch_size": 16, "shuffle": True} | options)


class Collate:
    """Collation with its own random numbers."""

    def __init__(self):
        self.mix = np.random.default_rng(0)

    def __call__(self, items):
        x, y = torch.utils.data.default_collate(items)
        return x * self.mix.random(), y


def generator():
    return torch.Generator().manual_seed(3)


RandomSampler, BatchSampler = torch.utils.data.RandomSampler, torch.utils.data.BatchSampler
LOADERS = {
    "shuffled": loader, "generator": lambda: loader(generator=generator()), "broken state": lambda: loader(Broken()),
    "sampler": lambda: loader(shuffle=False, sampler=RandomSampler(range(64), generator=generator())),
    "batch sampler": lambda: torch.utils.data.DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(range(64), generator=generator()), 16, False)),
    "own sampler": lambda: loader(shuffle=False, sampler=Epochs()), "collate": lambda: loader(collate_fn=Collate()),
    "subsets": lambda: loader(torch.utils.data.ConcatDataset([torch.utils.data.Subset(Noisy(), range(32)), Noisy()])),
    "stream": lambda: torch.utils.data.DataLoader(Stream(), batch_size=16), "wrapped": lambda: Wrapped(loader()),
    "list": lambda: [(x.clone(), y) for x, y in PAIRS]}
WORKERS = {
    "one worker": lambda: loader(num_workers=1), "persistent": lambda: loader(num_workers=1, persistent_workers=True),
    "persistent stream": lambda: torch.utils.data.DataLoader(Stream(), batch_size=16, num_workers=1, persistent_workers=True),
    "persistent inside": lambda: Wrapped(loader(num_workers=2, persistent_workers=True))}


def seeded(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.mark.parametrize("name", [*LOADERS, *WORKERS])
def test_loaders_continue_as_if_find_lr_had_not_run(name):
    results = []
    for ask in (False, True):
        seeded(1)
        model, batches = network(), {**LOADERS, **WORKERS}[name]()
        optimizer, seen = adam(model), []
        for epoch in range(2):
            seeded(epoch)
            seen += train(model, optimizer, batches)
            iterator = getattr(getattr(batches, "loader", batches), "_iterator", None)
            if ask:
                find_lr(model, batches, optimizer, **SHORT)
            assert getattr(getattr(batches, "loader", batches), "_iterator", None) is iterator, "the workers are its own ones"
        drawn = torch.tensor([random.random(), np.random.rand(), torch.rand(())])
        results.append([*seen, drawn, *train(model, optimizer, batches)])
        if name == "wrapped":
            assert batches.passes == 3 and batches.open == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_find_lr_in_the_middle_of_a_pass():
    results = []
    for ask in (False, True):
        seeded(2)
        model, batches = network(), loader(generator=generator())
        optimizer, seen = adam(model), []
        for number, (x, y) in enumerate(batches):
            seen += [x, *train(model, optimizer, [(x, y)])]
            if ask and number == 1:
                find_lr(model, batches, optimizer, **SHORT)
        results.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_validation_batches_continue_too():
    results = []
    for ask in (False, True):
        seeded(2)
        model, valid = network(), loader(Noisy())
        if ask:
            find_lr(model, PAIRS, adam(model), valid=valid, **SHORT)
        results.append([x for x, _ in valid])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_images_changed_in_place_are_restored():
    batches = [(x.clone(), y) for x, y in PAIRS]

    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x.mul_(0.9))

    model = Scaling()
    find_lr(model, batches, adam(model), **SHORT)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, PAIRS, strict=True))


# What a model keeps

class Keeping(nn.Module):
    """A network that keeps state in every way Python has, and lets its output depend on it."""

    def __init__(self):
        super().__init__()
        self.inner, self.steps, self.seen, self.queue = network(), 0, {"means": [], "classes": Counter()}, deque([0.0], maxlen=3)
        self.running, self.array, self.names, self.numbers = torch.zeros(3), np.zeros(2), {"a"}, np.random.default_rng(0)
        self.nested = SimpleNamespace(metric=[SimpleNamespace(total=0)])
        self.register_buffer("grown", torch.zeros(1), persistent=False)

    def __getstate__(self):
        raise TypeError("cannot be copied or pickled")

    def forward(self, x):
        self.steps += 1
        self.nested.metric[0].total += len(x)
        self.seen["means"].append(x.mean().item())
        self.seen["classes"][self.steps % 3] += 1
        self.queue.append(x.std().item())
        self.running.lerp_(x.detach().mean(0)[:3], 0.1)
        self.array += 1
        self.names.add(str(self.steps))
        self.grown = torch.cat([self.grown, torch.ones(1)])
        factor = self.steps + len(self.seen["means"]) + sum(self.queue) + self.array.sum() + len(self.names) + len(self.grown)
        return self.inner(x) * (1 + 0.01 * factor + self.numbers.random() + 0.01 * self.nested.metric[0].total) + self.running


def test_attributes_metrics_and_counters_are_restored():
    compare(adam, make_model=Keeping)


def test_an_attribute_made_in_a_forward_pass_is_removed():
    class Lazily(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            if not hasattr(self, "scale"):
                self.scale, self.extra = x.std().item(), nn.Linear(1, 1)
            return self.inner(x) / self.scale

    model = Lazily()
    find_lr(model, PAIRS, adam(model), **SHORT)
    assert not hasattr(model, "scale") and not hasattr(model, "extra")


class Hook:
    """A hook that counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1


def test_hooks_keep_their_counters():
    def make(model):
        calls, steps = [0], 0

        def count(module, inputs, output):
            nonlocal steps
            steps += 1
            calls[0] += 1
            return output * (1 + 0.01 * steps + 0.01 * calls[0] + 0.01 * model.hook.calls)

        model.hook = Hook()
        model.register_forward_pre_hook(model.hook)
        model[0].register_forward_hook(count)
        optimizer = adam(model)
        optimizer.register_step_pre_hook(functools.partial(decay, memory := {"steps": 0}))
        optimizer.memory = memory
        return optimizer

    def decay(memory, optimizer, *_):
        memory["steps"] += 1
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.001 * memory["steps"]

    compare(make)


def test_gradients_modes_and_frozen_parts_are_restored():
    model = network()
    model[1].eval().requires_grad_(False)
    mean = model[1].running_mean.clone()
    F.cross_entropy(model(POINTS), CLASSES).backward()
    gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    memory = [value.data_ptr() for value in model.state_dict().values()]
    find_lr(model, PAIRS, **SHORT)
    assert torch.equal(model[1].running_mean, mean) and not model[1].training and model.training
    assert memory == [value.data_ptr() for value in model.state_dict().values()]
    for p, (grad, values) in zip(model.parameters(), gradients, strict=True):
        assert p.grad is grad and (grad is None or torch.equal(grad, values))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_scripted_models_are_restored():
    model = torch.jit.script(network())
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_lr(model, PAIRS, torch.optim.SGD(model.parameters(), 0.1), **SHORT)
    assert not model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_losses_with_state_are_restored():
    class Weighted:
        def __init__(self):
            self.calls = 0

        def __call__(self, output, labels):
            self.calls += 1
            return F.cross_entropy(output, labels) * self.calls

    loss, model, seen = Weighted(), network(), []
    find_lr(model, PAIRS, adam(model), loss, **SHORT)
    find_lr(model, PAIRS, adam(model), lambda o, y: seen.append(1) or F.cross_entropy(o, y), **SHORT)
    assert loss.calls == 0 and len(seen) >= 10, "a function may record what it sees"


# Batches, outputs and precisions

class NoArgument:
    """torchvision's ImageList: `to` knows the device only."""

    def __init__(self, tensors):
        self.tensors = tensors

    def to(self, device):
        return NoArgument(self.tensors.to(device))


class InPlace(NoArgument):
    def to(self, device, non_blocking=False):
        self.tensors = self.tensors.to(device)


class Encoding(UserDict):
    """transformers' BatchEncoding: a dictionary with its own `to`."""

    def to(self, device):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


@pytest.mark.parametrize("kind", [NoArgument, InPlace])
def test_batches_that_move_in_their_own_way(kind):
    model = network()
    batches = [(kind(x), y) for x, y in PAIRS]
    expected = find_lr(model, PAIRS, adam(model), **SHORT).losses
    found = find_lr(model, batches, adam(model), step=lambda m, b: F.cross_entropy(m(b[0].tensors), b[1]), **SHORT).losses
    assert np.array_equal(found, expected)


Output = namedtuple("Output", "logits aux")


class Returns(nn.Module):
    """A network with another kind of output."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.form = network(), form

    def forward(self, x):
        return self.form(self.inner(x))


FORMS = {
    "dict": lambda z: OrderedDict(logits=z), "out": lambda z: {"out": z, "aux": z}, "one key": lambda z: {"y": z},
    "tuple": lambda z: (z, z), "named": lambda z: Output(z, None), "object": lambda z: SimpleNamespace(logits=z, loss=None)}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_that_are_no_tensor(form):
    model, plain = Returns(FORMS[form]), network()
    expected = find_lr(plain, PAIRS, adam(plain), **SHORT).losses
    assert torch.is_tensor(logits_of(FORMS[form](POINTS)))
    for criterion in (None, nn.CrossEntropyLoss(), F.cross_entropy):
        assert np.array_equal(find_lr(model, PAIRS, adam(model), criterion, **SHORT).losses, expected)
    raw = find_lr(model, PAIRS, adam(model), lambda output, y: F.cross_entropy(logits_of(output), y), **SHORT)
    assert np.array_equal(raw.losses, expected), "a loss for the whole output gets it"


def test_the_loss_that_a_model_computes_itself():
    """As models of transformers do for tokens: logits (B, T, C) are no class scores (B, C, T)."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(6, 3)

        def forward(self, inputs, labels=None):
            logits = self.head(inputs)
            loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return SimpleNamespace(logits=logits, loss=loss)

    model = Tokens()
    batches = [Encoding(inputs=x.reshape(4, 4, 6), labels=y.reshape(4, 4)) for x, y in PAIRS]
    plain = [(x, y) for x, y in PAIRS]
    own = find_lr(model, batches, adam(model), **SHORT)
    expected = find_lr(model.head, plain, adam(model.head), **SHORT)
    assert np.allclose(own.losses, expected.losses)
    with pytest.raises(InputError, match="not class scores"):
        find_lr(Returns(lambda z: z.sum(1)), PAIRS, **SHORT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_another_precision(dtype):
    model = network().to(dtype)
    for criterion in (None, nn.CrossEntropyLoss()):
        result = find_lr(model, PAIRS, sgd(model), criterion, num_steps=10, trials=0)  # Adam divides by 0 in float16
        assert np.isfinite(result.losses[:5]).all() and all(p.dtype == dtype for p in model.parameters())
    other = "bfloat16" if dtype != torch.bfloat16 else "float16"
    with pytest.raises(InputError, match="weights are"):
        find_lr(model, PAIRS, adam(model), precision=other)
    if dtype == torch.float64:
        data = load_data("shapes").subset(64, 20)
        images = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).double()
        assert len(find_lr(images, data, batch_size=16, num_steps=10, trials=0).losses)


def test_a_last_batch_of_one_before_batch_normalization():
    model = network()
    batches = [(x[:33][i:i + 16], y[:33][i:i + 16]) for x, y in [(POINTS, CLASSES)] for i in range(0, 33, 16)]
    assert len(batches[-1][0]) == 1
    assert len(find_lr(model, batches, adam(model), **SHORT).losses) == 10
    with pytest.raises(InputError, match="more than one image"):
        find_lr(model, [(x[:1], y[:1]) for x, y in PAIRS], adam(model), **SHORT)


# The interface

def test_optimizer_and_criterion_may_be_positional_and_classes():
    model = network()
    by_name = find_lr(model, PAIRS, optimizer=sgd(model), criterion=F.cross_entropy, **SHORT)
    assert np.array_equal(find_lr(model, PAIRS, sgd(model), F.cross_entropy, **SHORT).losses, by_name.losses)
    made = functools.partial(torch.optim.SGD, momentum=0.9)
    for optimizer in made, lambda params: made(params):
        assert np.array_equal(find_lr(model, PAIRS, optimizer, F.cross_entropy, **SHORT).losses, by_name.losses)
    assert len(find_lr(model, PAIRS, torch.optim.AdamW, **SHORT).losses) and len(find_lr(model, PAIRS, "sgd", **SHORT).losses)
    for wrong in F.cross_entropy, nn.CrossEntropyLoss(), functools.partial(torch.optim.SGD, momentum=-1), 0.1, "unknown":
        with pytest.raises(InputError):
            find_lr(model, PAIRS, wrong, **SHORT)
    assert list(inspect.signature(find_lr).parameters)[:4] == ["model", "data", "optimizer", "criterion"]


def test_options_without_an_effect_are_refused():
    model, data = network(), load_data("shapes").subset(64, 20)
    images = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    for changes in ({"epochs": 24}, {"max_lr": 0.1}, {"pct_start": 0.1}, {"final_div_factor": 10.0}, {"unknown": 1}):
        with pytest.raises(InputError, match=next(iter(changes))):
            find_lr(images, data, **changes)
    for changes in ({"batch_size": 8}, {"weight_decay": 0.1}, {"label_smoothing": 0.1}):
        with pytest.raises(InputError, match="no effect"):
            find_lr(model, PAIRS, sgd(model), F.cross_entropy, **changes, **SHORT)
    assert len(find_lr(images, data, batch_size=16, weight_decay=0.1, label_smoothing=0.1, **SHORT).losses)


def test_an_optimizer_without_a_learning_rate_is_refused():
    model = network()
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(InputError, match="learning rate"):
        find_lr(model, PAIRS, optimizer, **SHORT)


def test_find_lr_works_without_gradients_enabled():
    model = network()
    with torch.no_grad():
        find_lr(model, PAIRS, adam(model), **SHORT)
        assert not torch.is_grad_enabled()


# Stored results

def stored(tmp_path, **changes):
    result = LRRangeTest(np.geomspace(1e-6, 1, 12), np.ones(12), np.ones(12), 0.01, low=0.005, high=0.02,
                         trials=[(0.01, 1.0), (0.1, float("inf"))], points={"minimum": 0.1})
    path = tmp_path / "lr_find.json"
    result.save(path)
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))
    return path


BAD = {
    "suggestion": [float("nan"), float("inf"), -0.1, 0.0, True, "0.01", [0.01]], "low": [float("nan"), -1.0, "x", True, 0.5],
    "high": [float("inf"), {}, 0.001], "lrs": [None, "x", [float("nan")] * 12, [-1.0] * 12, [1, "2"], [[1.0]] * 12, [True] * 12],
    "losses": [None, ["1"] * 12, {}], "points": [{"minimum": float("nan")}, {"minimum": "0.1"}, [], {"minimum": True}],
    "trials": [[[0.1]], [[float("nan"), 1.0]], ["ab"], [[-0.1, 1.0]], 3, [["0.1", 1.0]]], "longer": [[[0.1, "x"]], {"a": 1}],
    "reason": [3, ["a"]], "doubt": [1.5, True], "run": [3, ["a"]],
    "band": [[1.0], "x"], "validation": [[1.0], "x"], "smoothed": [[1.0] * 20, None],
    "unknown": [1]}


@pytest.mark.parametrize("field, value", [(field, value) for field, values in BAD.items() for value in values])
def test_a_stored_result_with_a_wrong_value_is_refused_in_one_line(tmp_path, field, value):
    path = stored(tmp_path, **{field: value})
    with pytest.raises(InputError, match="holds no LR range test") as error:
        LRRangeTest.load(path)
    assert "\n" not in str(error.value)


def test_a_stored_result_is_read_back(tmp_path):
    result = LRRangeTest.load(stored(tmp_path))
    assert result.suggestion == 0.01 and result.trials[1] == (0.1, float("inf"))
    assert len(LRRangeTest.load(stored(tmp_path, losses=[1.0] * 11 + [float("nan")])).losses) == 12, "the loss that ended a sweep"
    nothing = LRRangeTest.load(stored(tmp_path, suggestion=None, low=None, high=None, reason="the loss never fell"))
    assert nothing.suggestion is None


# Other libraries

def test_schedule_free():
    schedulefree = pytest.importorskip("schedulefree")
    for kind in schedulefree.SGDScheduleFree, schedulefree.AdamWScheduleFree, schedulefree.RAdamScheduleFree:
        compare(lambda m, kind=kind: kind(m.parameters(), lr=0.01), schedule=False)
        model = network()
        find_lr(model, PAIRS, kind(model.parameters(), lr=0.01), valid=PAIRS, **SHORT)


def test_torch_optimizer():
    torch_optimizer = pytest.importorskip("torch_optimizer")
    kinds = [torch_optimizer.get(name) for name in "adabound adamp diffgrad lamb novograd qhadam radam ranger sgdw swats yogi "
             "madgrad accsgd pid".split()]
    for kind in kinds:
        compare(lambda m, kind=kind: kind(m.parameters(), lr=0.01))
    compare(lambda m: torch_optimizer.Adahessian(m.parameters(), lr=0.01), create_graph=True)
    compare(lambda m: torch_optimizer.Lookahead(torch_optimizer.Yogi(m.parameters(), lr=0.01)), schedule=False)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    results = []
    for ask in (False, True):
        seeded(3)
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        optimizer = adam(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        model, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, loader(Noisy()), scheduler)
        if ask:
            find_lr(model, batches, optimizer, **SHORT)
        assert not accelerator.gradient_state.in_dataloader
        losses = []
        for x, y in itertools.chain(batches, batches):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        results.append([*losses, *(p.detach().clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"batch_size": 8}, {"labels": True}])
def test_a_range_test_of_another_run_is_refused(tmp_path, changes):
    """A run that was stopped between its range test and its first epoch leaves lr_find.json alone."""
    import dataclasses

    from attn_cifar.data import load_data
    from attn_cifar.lr_finder.finder import _digest, _load_own
    from attn_cifar.models import create_model
    from attn_cifar.training.recipes import choose_recipe

    data, model = load_data("shapes").subset(40, 20), create_model("basic_attn")
    recipe = choose_recipe(model, "plain", {"batch_size": 10, "epochs": 2})
    LRRangeTest(np.geomspace(1e-6, 1, 12), np.ones(12), np.ones(12), 0.01, run=_digest(model, data, recipe, 0)).save(
        tmp_path / "lr_find.json")
    longer = dataclasses.replace(recipe, epochs=9, max_lr=0.5)
    assert _load_own(tmp_path / "lr_find.json", _digest(model, data, longer, 0)).suggestion == 0.01
    other = dataclasses.replace(data, train_labels=data.train_labels[::-1].copy()) if changes.pop("labels", False) else data
    seed = changes.pop("seed", 0)
    with pytest.raises(InputError, match="another model, recipe, seed or data"):
        _load_own(tmp_path / "lr_find.json", _digest(model, other, dataclasses.replace(recipe, **changes), seed))
