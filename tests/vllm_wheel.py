"""The sources of a vLLM wheel, read without importing them: what a module has, what a call may say,
and single definitions of it run over stand-ins for the rest."""

from __future__ import annotations
import __future__

import ast
import inspect
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

Found = tuple[str, ast.AST]
"""A definition, and the module that it stands in."""


class Wheel:
    """A wheel's modules as syntax trees."""

    def __init__(self, path: Path):
        self.files = zipfile.ZipFile(path)
        self.names = set(self.files.namelist())

    def _file(self, module: str) -> str:
        path = module.replace(".", "/")
        return f"{path}.py" if f"{path}.py" in self.names else f"{path}/__init__.py"

    @cache
    def tree(self, module: str) -> ast.Module:
        return ast.parse(self.files.read(self._file(module)))

    def find(self, module: str, name: str) -> Found | None:
        """The last definition of a name, wherever the module has it from."""
        found: Found | None = None
        if self._file(module) not in self.names:
            return None
        for node in statements(self.tree(module).body):
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*":
                        found = found or self.find(source, name)
                    elif (alias.asname or alias.name) == name:
                        found = self.find(source, alias.name) or (source, node)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                found = (module, node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    found = (module, node)
        return found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = self._file(module).endswith("__init__.py")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def member(self, found: Found, name: str) -> Found | None:
        """A method or field of a class, also of one that it inherits from."""
        module, node = found
        assert isinstance(node, ast.ClassDef), f"{module}: not a class"
        own = None
        for part in node.body:
            named = getattr(part, "name", None) or getattr(getattr(part, "target", 0), "id", None)
            own = (module, part) if named == name else own
        if own is not None:
            return own
        for base in node.bases:
            inner = base.value if isinstance(base, ast.Subscript) else base
            parent = self.find(module, inner.id) if isinstance(inner, ast.Name) else None
            if parent is None or not isinstance(parent[1], ast.ClassDef):
                continue
            if has := self.member(parent, name):
                return has
        return None

    def signature(self, found: Found) -> inspect.Signature:
        """Of a function; of a class, that of making one."""
        module, node = found
        if isinstance(node, ast.FunctionDef):
            return signature_of(node)
        init = self.member(found, "__init__")
        if init is not None:
            made = signature_of(init[1])
            return made.replace(parameters=list(made.parameters.values())[1:])
        assert isinstance(node, ast.ClassDef)
        assert any("dataclass" in ast.dump(part) for part in node.decorator_list), module
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature(
            [
                inspect.Parameter(part.target.id, keyword, default=0 if part.value else keyword)
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            ]
        )

    def run(self, module: str, names: Iterable[str], namespace: dict[str, Any]) -> None:
        """Run definitions of a module as they are, annotations apart, over `namespace`."""
        nodes = [self.find(module, name) for name in names]
        assert all(nodes), f"{module}: not all of {names}"
        body = [node for _, node in nodes]
        code = compile(
            ast.Module(body, []),
            module,
            "exec",
            flags=__future__.annotations.compiler_flag,
            dont_inherit=True,
        )
        exec(code, namespace)


def statements(body: list[ast.stmt]) -> Iterable[ast.stmt]:
    """Those of a module, also under its conditions."""
    for node in body:
        yield node
        for name in ("body", "orelse", "handlers"):
            if isinstance(node, (ast.If, ast.Try)):
                yield from statements(getattr(node, name, []))


def signature_of(node: ast.AST) -> inspect.Signature:
    assert isinstance(node, ast.FunctionDef)
    arguments, kinds = node.args, inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [kinds.empty] * (len(plain) - len(arguments.defaults)) + [
        ast.unparse(value) for value in arguments.defaults
    ]
    parameters = [
        kinds(arg.arg, kinds.POSITIONAL_OR_KEYWORD, default=default)
        for arg, default in zip(plain, defaults, strict=True)
    ]
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = kinds.empty if value is None else ast.unparse(value)
        parameters.append(kinds(arg.arg, kinds.KEYWORD_ONLY, default=default))
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def bind(signature: inspect.Signature, call: ast.Call) -> None:
    """Raises TypeError where the call does not fit."""
    assert not any(isinstance(arg, ast.Starred) for arg in call.args)
    keywords = [keyword.arg for keyword in call.keywords]
    assert None not in keywords
    signature.bind(*call.args, **dict.fromkeys(map(str, keywords)))
