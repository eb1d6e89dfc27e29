"""The layers of the product: imports go down only, the torch-free parts stay so, nothing grows too large.

And every option that is read from a config is declared.
"""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from harness_params import SCHEMA
from tests.conftest import ROOT

# Parts of the product, low to high: a part may import its own layer and those below. The longest name that fits a
# module is its part. Parts of one layer may import each other too, but not in a circle.
LAYERS = [
    [
        "utils",
        "utils.errors",
        "utils.plugins",
        "utils.registry",
        "utils.seeds",
        "utils.wording",
        "utils.files",
        "utils.output",
        "utils.schedulers",
        "utils.optimizers",
        "utils.conv_type",
        "utils.state_dicts",
        "utils.status_lines",
        "utils.processes",
    ],
    ["utils.config", "utils.data.specs", "utils.pruning.methods"],
    ["harness_params"],
    ["utils.distributed", "utils.launcher"],
    ["utils.data", "utils.networks", "utils.pruning", "utils.ffcv"],
    ["utils.dataset", "utils.models", "utils.pruning_utils"],
    ["utils.training"],
    ["utils.runs"],
    ["harness_utils"],
    ["harness", "utils.grids", "utils.plots", "utils.bench", "utils.analysis", "utils.overview"],
    ["utils.reports"],
    [
        "utils.single_gpu_harness",
        "utils.benchmark",
        "utils.run_grid",
        "utils.plot_results",
        "utils.report",
        "utils.show",
        "utils.write_beton",
        "utils.analyze",
    ],
]
# `--help` and faults of a config answer at once: these import nothing that takes seconds to load. So do all packages.
TORCH_FREE = [
    "utils.errors", "utils.plugins", "utils.registry", "utils.seeds", "utils.wording", "utils.files", "utils.output",
    "utils.schedulers", "utils.optimizers", "utils.config", "utils.processes", "utils.status_lines",
    "utils.data.specs", "utils.pruning.methods", "harness_params",
]  # fmt: skip
HEAVY = {"torch", "torchvision", "numpy", "pandas"}
# Figures and grids read tables, and start without torch.
TABLES_ONLY = [
    "utils.runs.tables",
    "utils.runs.records",
    "utils.runs.remaining",
    "utils.runs.saved",
    "utils.plots",
    "utils.grids",
    "utils.overview",
    "utils.plot_results",
    "utils.reports",
    "utils.report",
    "utils.show",
    "utils.run_grid",
]
TORCH = {"torch", "torchvision"}
# Names that hold a config in the product.
CONFIGS = {"cfg", "c", "config"}

FILE_LINES, FUNCTION_LINES = 300, 50
LONGER: dict[str, int] = {}  # "path" or "path:function" -> lines that it may have


class Import(NamedTuple):
    """One imported name, and whether importing the module runs it: not in functions nor under TYPE_CHECKING."""

    target: str
    line: int
    at_once: bool


class Product:
    """The modules below a folder, tests left out, and what each imports."""

    def __init__(self, root: Path):
        files = [*root.glob("*.py"), *root.glob("utils/**/*.py")]
        self.root = root
        self.paths = {self._name(path): path for path in sorted(files)}
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.paths.items()}
        self.imports = {name: list(self._imports(name)) for name in self.paths}

    def _name(self, path: Path) -> str:
        return ".".join(path.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")

    def _imports(self, module: str) -> Iterable[Import]:
        waiting: list[tuple[ast.AST, bool]] = [(self.trees[module], True)]
        while waiting:
            node, at_once = waiting.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                at_once = False
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                waiting += [(child, False) for child in node.body]
                waiting += [(child, at_once) for child in node.orelse]
                continue
            elif isinstance(node, ast.Import):
                yield from (Import(alias.name, node.lineno, at_once) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (Import(target, node.lineno, at_once) for target in self._targets(module, node))
            waiting += [(child, at_once) for child in ast.iter_child_nodes(node)]

    def _targets(self, module: str, node: ast.ImportFrom) -> Iterable[str]:
        base = node.module or ""
        if node.level:
            package = module if self.paths[module].name == "__init__.py" else module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *filter(None, [base])])
        for alias in node.names:
            inside = f"{base}.{alias.name}"
            yield inside if inside in self.paths else base

    def edges(self) -> dict[str, set[str]]:
        """{module: modules of the product that it names in an import, wherever that stands}."""
        return {name: {i.target for i in found if i.target in self.paths} for name, found in self.imports.items()}

    def where(self, module: str, target: str) -> str:
        line = next(i.line for i in self.imports[module] if i.target == target)
        return f"{self.paths[module].relative_to(self.root)}:{line}: {module} imports {target}"


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes each of which is reached from the others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += edges.get(node, ())
        return seen

    reach = {node: reached(node) for node in edges}
    groups = {
        tuple(sorted(o for o in reach[node] if node in reach.get(o, ()))) for node in edges if node in reach[node]
    }
    return [list(group) for group in sorted(groups)]


def part_of(module: str) -> str:
    """The entry of `LAYERS` that `module` belongs to; empty if none fits."""
    names = {part for layer in LAYERS for part in layer}
    part = module
    while part not in names:
        part = part.rpartition(".")[0]
        if part in ("", "utils"):  # "utils" is its __init__.py alone: a new module below it needs a line of its own
            return ""
    return part


def layer_faults(product: Product) -> list[str]:
    """Circles between modules or parts, upward imports, and modules without a layer."""
    known = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    faults, part_edges = [], defaultdict(set)
    for module, targets in product.edges().items():
        part = part_of(module)
        if not part:
            faults.append(f"{module} stands in no layer")
        for target in targets if part else ():
            above = part_of(target) or part
            if above != part:
                part_edges[part].add(above)
            if known[above] > known[part]:
                faults.append(f"upward: {product.where(module, target)}")
    faults += [f"circle of modules: {', '.join(group)}" for group in circles(product.edges())]
    return faults + [f"circle of parts: {', '.join(group)}" for group in circles(part_edges)]


def heavy_faults(product: Product) -> list[str]:
    """Imports by which a module reaches a library that it must start without."""
    packages = [name for name, path in product.paths.items() if path.name == "__init__.py"]
    light = [name for name in product.paths if name in packages or _fits(name, TORCH_FREE)]
    readers = [name for name in product.paths if _fits(name, TABLES_ONLY)]
    return sorted(_reached(product, light, HEAVY) | _reached(product, readers, TORCH))


def _reached(product: Product, starts: Iterable[str], libraries: set[str]) -> set[str]:
    faults = set()
    for start in starts:
        waiting, seen = _with_packages(start), set()
        while waiting:
            module = waiting.pop()
            if module in seen or module not in product.paths:
                continue
            seen.add(module)
            for found in product.imports[module]:
                if found.at_once and found.target.partition(".")[0] in libraries:
                    faults.add(f"{start} is to be light, and {product.where(module, found.target)}")
                if found.at_once:
                    waiting += _with_packages(found.target)
    return faults


def _with_packages(module: str) -> list[str]:
    """What importing `module` runs: a.b.c runs a and a.b first."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _fits(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def imports_of_tests(product: Product) -> list[str]:
    """Imports of the tests."""
    return [
        product.where(module, found.target)
        for module, imports in product.imports.items()
        for found in imports
        if found.target.partition(".")[0] == "tests"
    ]


def docstring_faults(product: Product) -> list[str]:
    """Folders of modules that are no package, and packages that do not say what they hold."""
    folders = {path.parent for path in product.paths.values()} - {product.root}
    faults = [f"{folder.relative_to(product.root)}: no __init__.py" for folder in sorted(folders)
              if not (folder / "__init__.py").exists()]  # fmt: skip
    packages = [name for name, path in product.paths.items() if path.name == "__init__.py"]
    return faults + [f"{name}: no docstring" for name in packages if not ast.get_docstring(product.trees[name])]


def size_faults(product: Product) -> list[str]:
    """Files and functions that have grown too long."""
    faults = []
    for module, path in product.paths.items():
        place, lines = str(path.relative_to(product.root)), len(path.read_text().splitlines())
        if lines > LONGER.get(place, FILE_LINES):
            faults.append(f"{place}: {lines} lines")
        for node in ast.walk(product.trees[module]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines, name = node.end_lineno - node.lineno + 1, f"{place}:{node.name}"
                if lines > LONGER.get(name, FUNCTION_LINES):
                    faults.append(f"{name}: {lines} lines")
    return faults


def option_faults(product: Product) -> list[str]:
    """Options that are read from a config by a name that `SCHEMA` does not have."""
    return [
        f"{product.paths[module].relative_to(product.root)}:{line}: no option {option}"
        for module, tree in product.trees.items()
        for option, line in options_read(tree)
        if SCHEMA.find(option) is None
    ]


def options_read(tree: ast.AST) -> Iterable[tuple[str, int]]:
    """("section.key", line) of each ``cfg.section.key``, and of ``e.key`` where ``e = cfg.section``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _section(node.value):
            yield f"{_section(node.value)}.{node.attr}", node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            short = _short_names(node)
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id in short:
                    yield f"{short[inner.value.id]}.{inner.attr}", inner.lineno


def _section(node: ast.AST) -> str:
    """The section that an expression such as ``self.cfg.optimizer`` stands for; empty if it is another thing."""
    if not isinstance(node, ast.Attribute) or node.attr not in {section for section, _ in SCHEMA.entries}:
        return ""
    holder = node.value
    name = holder.id if isinstance(holder, ast.Name) else holder.attr if isinstance(holder, ast.Attribute) else ""
    return node.attr if name in CONFIGS else ""


def _short_names(function: ast.AST) -> dict[str, str]:
    """{name: section} of the names that a function gives to sections, and to nothing else."""
    stored = Counter(n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    short = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts) if several else [(target, value)]
            for name, given in pairs:
                if isinstance(name, ast.Name) and stored[name.id] == 1 and _section(given):
                    short[name.id] = _section(given)
    return short


CHECKS = [layer_faults, heavy_faults, imports_of_tests, docstring_faults, size_faults, option_faults]


@pytest.fixture(scope="module")
def product() -> Product:
    return Product(ROOT)


@pytest.mark.parametrize("check", CHECKS)
def test_product(check, product):
    assert "harness" in product.paths and len(product.paths) > 60
    assert check(product) == []


def test_layers_name_what_exists(product):
    """A part that has moved must not leave its line behind."""
    named = [part for layer in LAYERS for part in layer] + TORCH_FREE + TABLES_ONLY
    assert [name for name in named if name not in product.paths] == []
    places = {str(path.relative_to(ROOT)) for path in product.paths.values()}
    assert [name for name in LONGER if name.partition(":")[0] not in places] == []


def test_options_are_seen(product):
    """The check of options reads what it is to check; a few options are read by getattr alone."""
    seen = {option for tree in product.trees.values() for option, _ in options_read(tree)}
    declared = set(SCHEMA.paths(lambda option: True))
    assert len(declared - seen) <= 5, declared - seen


@pytest.mark.parametrize(("names", "libraries"), [(TORCH_FREE, HEAVY), (TABLES_ONLY, TORCH)])
def test_light_modules_load_nothing_heavy(names, libraries, product):
    """As above, asked of Python: each module named is the first to load what it names."""
    packages = [name for name, path in product.paths.items() if path.name == "__init__.py"]
    light = sorted({*packages, *(name for name in product.paths if _fits(name, names))})
    program = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module(name)
    loaded = {libraries!r} & sys.modules.keys()
    if loaded:
        sys.exit(f"{{name}} loads {{loaded}}")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- the checks find what they look for ------------------------------------------------------------------------------

SOUND = {
    "harness.py": "import utils.files\n",
    "harness_params.py": "from utils import errors, seeds\nimport utils.pruning.methods\n",
    "utils/__init__.py": '"""All."""\n',
    "utils/errors.py": "",
    "utils/seeds.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
    "utils/files.py": "",
    "utils/conv_type.py": "from . import files\nimport torch\n",
    "utils/pruning/__init__.py": '"""Pruning."""\n',
    "utils/pruning/methods.py": "def lazily():\n    import torch\n",
    "utils/pruning/scores.py": "from utils import conv_type\n",
}


def write_product(folder: Path, changes: dict[str, str]) -> Product:
    for name, text in (SOUND | changes).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Product(folder)


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_product_passes(check, tmp_path):
    assert check(write_product(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("check", "changes", "fault"),
    [
        (layer_faults, {"utils/files.py": "from utils import conv_type\n"},
         "circle of modules: utils.conv_type, utils.files"),
        (layer_faults, {"utils/files.py": "def f():\n    import utils.conv_type\n"},
         "circle of modules: utils.conv_type, utils.files"),
        (layer_faults,
         {"utils/data/__init__.py": '"""Data."""\n', "utils/data/a.py": "import utils.pruning.scores\n",
          "utils/data/b.py": "", "utils/pruning/other.py": "import utils.data.b\n"},
         "circle of parts: utils.data, utils.pruning"),
        (layer_faults,
         {"utils/seeds.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from harness import Harness\n"},
         "upward: utils/seeds.py:3: utils.seeds imports harness"),
        (layer_faults, {"utils/conv_type.py": "def f():\n    from .pruning import scores\n"},
         "upward: utils/conv_type.py:2: utils.conv_type imports utils.pruning.scores"),
        (layer_faults, {"utils/news.py": ""}, "utils.news stands in no layer"),
        (layer_faults, {"news.py": ""}, "news stands in no layer"),
        (heavy_faults, {"utils/seeds.py": "import numpy.random\n"},
         "harness_params is to be light, and utils/seeds.py:1: utils.seeds imports numpy.random"),
        (heavy_faults, {"utils/errors.py": "class A:\n    import torch.nn\n"},
         "utils.errors is to be light, and utils/errors.py:2: utils.errors imports torch.nn"),
        (heavy_faults, {"utils/errors.py": "import utils.conv_type\n"},
         "utils.errors is to be light, and utils/conv_type.py:2: utils.conv_type imports torch"),
        (heavy_faults, {"utils/pruning/__init__.py": "from pandas import NA\n"},
         "utils.pruning.methods is to be light, and utils/pruning/__init__.py:1: utils.pruning imports pandas"),
        (heavy_faults,
         {"utils/plots/__init__.py": '"""Plots."""\n', "utils/plots/a.py": "import pandas\nimport utils.conv_type\n"},
         "utils.plots.a is to be light, and utils/conv_type.py:2: utils.conv_type imports torch"),
        (option_faults, {"utils/files.py": "def f(cfg):\n    return cfg.optimizer.lr + cfg.optimizer.speed\n"},
         "utils/files.py:2: no option optimizer.speed"),
        (option_faults, {"utils/files.py": "def f(self):\n    e, n = self.cfg.dist_params, 1\n    return e.proc\n"},
         "utils/files.py:3: no option dist_params.proc"),
        (imports_of_tests, {"utils/files.py": "def f():\n    from tests.conftest import ROOT\n"},
         "utils/files.py:2: utils.files imports tests.conftest"),
        (docstring_faults, {"utils/pruning/__init__.py": ""}, "utils.pruning: no docstring"),
        (docstring_faults, {"utils/new/one.py": ""}, "utils/new: no __init__.py"),
        (size_faults, {"utils/files.py": "\n" * 301}, "utils/files.py: 301 lines"),
        (size_faults, {"utils/files.py": "class A:\n    def f(self):\n" + "        1\n" * 50},
         "utils/files.py:f: 51 lines"),
    ],
)  # fmt: skip
def test_a_fault_is_found(check, changes, fault, tmp_path):
    assert fault in check(write_product(tmp_path, changes))
