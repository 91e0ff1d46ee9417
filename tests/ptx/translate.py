"""Translates PTX, the assembly language that nvcc compiles kernels to, into C++ for the host.

    python translate.py FOLDER FILE.ptx ...

Each kernel becomes a C++ function of its parameters that runs one thread, in a file of its own; registers become local
variables, instructions statements on what instructions.h declares. An instruction that is not known here ends the
translation with its name: nothing is guessed. Section numbers are those of NVIDIA's "Parallel Thread Execution ISA",
version 9.1.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

TYPES = {
    **{"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64", "pred": "bool"},
    **{name: name for name in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "f32", "f64")},
    **{"bf16": "u16", "f16x2": "u32", "bf16x2": "u32"},
}
BYTES = {"u8": 1, "s8": 1, "u16": 2, "s16": 2, "f16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8, "f64": 8}
FLOATS = {"f16", "f32", "f64"}
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
SPECIAL = {
    "%tid.x": "position->tid",
    "%ntid.x": "position->ntid",
    "%ctaid.x": "position->ctaid",
    "%nctaid.x": "position->nctaid",
    "%laneid": "position->lane",
    "%warpid": "position->tid / 32",
    "%cluster_ctarank": "position->cluster_rank",
    "%cluster_ctaid.x": "position->cluster_rank",
    "%cluster_nctarank": "position->cluster_size",
    "%cluster_nctaid.x": "position->cluster_size",
    "%clusterid.x": "position->ctaid / position->cluster_size",
    "%nclusterid.x": "position->nctaid / position->cluster_size",
    "%lanemask_eq": "1u << position->lane",
    "%lanemask_lt": "(1u << position->lane) - 1",
    "%lanemask_le": "(2u << position->lane) - 1",
    "%lanemask_gt": "~((2u << position->lane) - 1)",
    "%lanemask_ge": "~((1u << position->lane) - 1)",
    **{f"%{name}.{axis}": value for axis in "yz" for name, value in dict(tid=0, ctaid=0, ntid=1, nctaid=1).items()},
}
INT_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
INT_COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
FLOAT_COMPARISONS = {  # those ending in u are true if an operand is NaN
    **{"eq": "a == b", "ne": "a < b || a > b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b"},
    **{"equ": "!(a < b || a > b)", "neu": "a != b", "ltu": "!(a >= b)", "leu": "!(a > b)", "gtu": "!(a <= b)"},
    **{"geu": "!(a < b)", "num": "a == a && b == b", "nan": "a != a || b != b"},
}
ATOMICS = {
    **{"add": "old + value", "and": "old & value", "or": "old | value", "xor": "old ^ value", "exch": "value"},
    **{"min": "old < value ? old : value", "max": "old > value ? old : value", "cas": "old == value ? other : old"},
    **{"inc": "old >= value ? 0 : old + 1", "dec": "old == 0 || old > value ? value : old - 1"},
}
# Of loads and stores: order and caching, which make no difference where threads take turns and nothing is cached.
IGNORED = {"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "nc", "cta", "cluster", "gpu", "sys"}


SHARED = {"shared::cta": "shared", "shared::cluster": "shared_cluster"}  # names of functions in instructions.h


class Unknown(Exception):
    """What the translator cannot read."""


def split(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def statements(text: str):
    """Yields instructions and directives without their semicolon, labels with their colon, and the braces of scopes."""
    now = ""
    for c in text:
        if c in "{}" and not now.strip():
            yield c
            now = ""
        elif c == ";":
            yield " ".join(now.split())
            now = ""
        elif c == ":" and re.fullmatch(r"\s*[\w$]+", now):
            yield now.strip() + ":"
            now = ""
        else:
            now += c
    if now.strip():
        raise Unknown(now)


def identifier(name: str) -> str:
    return "r_" + re.sub(r"\W", "_", name)


def reinterpret(value: str, own: str, wanted: str) -> str:
    """C++ for the lower bits of a value of type `own`, as `wanted`."""
    if own == wanted:
        return value
    if "bool" in (own, wanted) or BYTES[own] < BYTES[wanted]:
        raise Unknown(f"a {own} read as {wanted}")
    if own in FLOATS:
        value = f"bits_{own}({value})"
    if wanted in FLOATS:
        return f"as_{wanted}((u{BYTES[wanted] * 8}){value})"
    return f"({wanted}){value}"


class Static(NamedTuple):
    """A shared variable of a size that is known."""

    align: int
    size: int


def static_shared(text: str) -> tuple[str, Static] | None:
    """The name and size of a shared variable that is declared here."""
    m = re.match(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d+)\])?$", text)
    return (m[3], Static(int(m[1]), BYTES[TYPES[m[2]]] * int(m[4] or 1))) if m else None


class Function:
    """One kernel, or one device function that a kernel calls."""

    def __init__(self, name: str, parameters: list[str], is_kernel: bool, shared: dict, called: "Called"):
        self.name, self.is_kernel, self.called = name, is_kernel, called
        self.shared = dict(shared)  # of a variable: its offset, or its size; None for dynamic shared memory
        self.static_shared = 0
        self.lines: list[str] = []
        self.scopes: list[dict[str, str]] = [{}]  # types of registers
        self.buffers: set[str] = set()  # C++ arrays: local memory, parameters of calls
        self.sites, self.mixes = list(called.sites), [dict(mix) for mix in called.mixes]
        self.starts_stretch = True
        self.layout: dict[str, tuple[int, int]] = {}  # offset and bytes of each parameter
        self.calls = False
        end = 0
        for parameter in parameters:
            align, kind, name, count = re.search(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$", parameter
            ).groups()
            size = BYTES[TYPES[kind]] * int(count or 1)
            offset = -(-end // int(align or size)) * int(align or size)
            self.layout[name] = (offset, size)
            end = offset + size
        if not is_kernel:
            self.buffers |= set(self.layout)

    # Operands.

    def type_of(self, register: str) -> str | None:
        return next((scope[register] for scope in reversed(self.scopes) if register in scope), None)

    def read(self, operand: str, wanted: str) -> str:
        """C++ for an operand as a value of this type."""
        if own := self.type_of(operand):
            return reinterpret(identifier(operand), own, wanted)
        if operand in SPECIAL:
            return f"({wanted})({SPECIAL[operand]})"
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return reinterpret(f"as_f32(0x{m[1]}u)", "f32", wanted)
        if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            return reinterpret(f"as_f64(0x{m[1]}ull)", "f64", wanted)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            bits = int(operand.rstrip("U"), 0) & (1 << 64) - 1
            return f"({wanted})0x{bits:x}ull" if wanted not in FLOATS else reinterpret(f"0x{bits:x}ull", "u64", wanted)
        if operand in self.buffers:
            return f"({wanted})(u64){operand}"
        if self.is_kernel and operand in self.layout:
            return f"({wanted})(u64)(parameters + {self.layout[operand][0]})"
        if operand in self.shared:
            if isinstance(self.shared[operand], Static):
                self.place(operand, self.shared[operand])
            offset = self.shared[operand]
            return f"({wanted})" + ("dynamic_shared()" if offset is None else str(offset))
        raise Unknown(f"operand {operand}")

    def write(self, register: str, own: str, value: str) -> str:
        """C++ that gives a register a value of type `own`, extended to the register's width."""
        if register == "_":
            return f"(void)({value});"
        wanted = self.type_of(register)
        if wanted is None:
            raise Unknown(f"register {register}")
        if own == wanted:
            return f"{identifier(register)} = {value};"
        if "bool" in (own, wanted) or BYTES[own] > BYTES[wanted]:
            raise Unknown(f"a {own} written to a {wanted}")
        if own in FLOATS:
            own, value = f"u{BYTES[own] * 8}", f"bits_{own}({value})"
        if wanted in FLOATS:
            return f"{identifier(register)} = as_{wanted}((u{BYTES[wanted] * 8})({value}));"
        return f"{identifier(register)} = ({wanted})({own})({value});"

    def address(self, operand: str, kind: str = "u64") -> str:
        """C++ of [register + offset]."""
        base, offset = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        own = self.type_of(base)
        value = f"({kind}){self.read(base, own if own else kind)}"
        return f"({value} + ({kind})({int(offset, 0)}))" if offset else value

    # Statements.

    def place(self, name: str, variable: "Static"):
        """Gives a variable its place in the kernel's static shared memory."""
        if not self.is_kernel:
            raise Unknown("shared memory in a function that is called")
        self.shared[name] = -(-self.static_shared // variable.align) * variable.align
        self.static_shared = self.shared[name] + variable.size

    def site(self) -> int:
        return len(self.sites) - 1

    def emit(self, line: str):
        self.lines.append(line)

    def declare(self, kind: str, names: str):
        """Registers. Those of the whole function start with all bits set: as floats, NaN."""
        for name in split(names):
            if m := re.fullmatch(r"(%\w+)<(\d+)>", name):
                registers = [f"{m[1]}{i}" for i in range(int(m[2]))]
            else:
                registers = [name]
            own = TYPES[kind]
            self.scopes[-1] |= {register: own for register in registers}
            rubbish = '__builtin_nanf("")' if own in FLOATS else "true" if own == "bool" else f"({own})~0ull"
            start = f" = {rubbish}" if len(self.scopes) == 1 else ""
            self.emit(f"{own} " + ", ".join(identifier(register) + start for register in registers) + ";")

    def statement(self, text: str):
        if text in "{}":
            self.scopes = [*self.scopes, {}] if text == "{" else self.scopes[:-1]
            return self.emit(text)
        if text.endswith(":"):
            self.starts_stretch = True
            return self.emit(f"{identifier(text[:-1])}:;")
        if text.startswith(".pragma") or text.startswith(".loc"):
            return
        if m := re.match(r"\.reg \.(\w+) (.*)", text):
            return self.declare(m[1], m[2])
        if variable := static_shared(text):
            return self.place(*variable)
        if m := re.match(r"\.(?:param|local) (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?$", text):
            size = BYTES[TYPES[m[2]]] * int(m[4] or 1)
            self.buffers.add(m[3])
            return self.emit(f"alignas(16) u8 {m[3]}[{size}];")
        guard = ""
        if m := re.match(r"@(!?)([%\w]+) (.*)", text):
            guard, text = f"if ({m[1]}{self.read(m[2], 'bool')}) ", m[3]
        name, _, operands = text.partition(" ")
        op = name.split(".")
        self.sites.append(text)
        code = self.instruction(op, split(operands))
        self.count(op)
        self.emit(f"{guard}{{ {code} }}" if guard else code)
        self.starts_stretch |= op[0] in ("bra", "ret", "exit")

    def count(self, op: list[str]):
        if self.starts_stretch:
            self.emit(f"++executed[{len(self.mixes)}];")
            self.mixes.append({})
            self.starts_stretch = False
        unit = unit_of(op)
        self.mixes[-1][unit] = self.mixes[-1].get(unit, 0) + 1

    def translate(self, body: str):
        for text in statements(body):
            try:
                self.statement(text)
            except (Unknown, KeyError, AttributeError, ValueError, IndexError) as error:
                raise Unknown(f"{self.name}: {text}: {error!r}") from error

    # Instructions: each method takes the words of the name and the operands, and returns C++.

    def instruction(self, op: list[str], x: list[str]) -> str:
        method = getattr(self, "op_" + op[0], None)
        code = method(op, x) if method else None
        if code is None:
            raise Unknown("not known")
        return code

    def call(self, function: str, kind: str, x: list[str], to: str | None = None) -> str:
        own = TYPES[kind]
        return self.write(x[0], to or own, f"{function}({', '.join(self.read(v, own) for v in x[1:])})")

    def binary(self, symbol: str, kind: str, x: list[str]) -> str:
        own = TYPES[kind]
        return self.write(x[0], own, f"({own})({self.read(x[1], own)} {symbol} {self.read(x[2], own)})")

    def op_mov(self, op, x):
        own = TYPES[op[-1]]
        for operand in x:
            if operand.startswith("{"):  # packs or unpacks
                parts = split(operand[1:-1])
                bits = BYTES[own] * 8 // len(parts)
        if x[0].startswith("{"):
            pieces = " ".join(self.write(part, f"u{bits}", f"whole >> {i * bits}") for i, part in enumerate(parts))
            return f"{{ const u64 whole = {self.read(x[1], own)}; {pieces} }}"
        if x[1].startswith("{"):
            pieces = (f"(u64){self.read(part, f'u{bits}')} << {i * bits}" for i, part in enumerate(parts))
            return self.write(x[0], own, f"({own})({' | '.join(pieces)})")
        return self.write(x[0], own, self.read(x[1], own))

    def op_ld(self, op, x):
        return self.access(op, x[1], x[0])

    def op_st(self, op, x):
        return self.access(op, x[0], x[1])

    def access(self, op, memory, value):
        own, is_load = TYPES[op[-1]], op[0] == "ld"
        words = [word for word in op[1:-1] if word not in IGNORED and not word.startswith(("L1::", "L2::"))]
        vector = next((word for word in words if word in ("v2", "v4")), "v1")
        spaces = [word for word in words if word != vector] or ["generic"]
        count, size = int(vector[1:]), BYTES[own]
        values = split(value[1:-1]) if value.startswith("{") else [value]
        if len(spaces) != 1 or len(values) != count:
            return None
        space = {"shared::cta": "shared", "shared::cluster": "shared_cluster", "local": "param"}.get(
            spaces[0], spaces[0]
        )
        if space == "param":
            place = f"(u8*){self.address(memory)}"
        elif space in ("global", "generic", "shared", "shared_cluster"):
            address = self.address(memory, "u32" if space.startswith("shared") else "u64")
            place = (
                f"{space}_at({address}, {{Access::{'load' if is_load else 'store'}, {size * count}, {self.site()}}})"
            )
        else:
            return None
        if is_load:
            moves = (self.write(v, own, f"((const {own}*)at)[{i}]") for i, v in enumerate(values))
        else:
            moves = (f"(({own}*)at)[{i}] = {self.read(v, own)};" for i, v in enumerate(values))
        return f"{{ u8* const at = {place}; {' '.join(moves)} }}"

    def op_atom(self, op, x):
        own = TYPES[op[-1]]
        words = [word for word in op[1:-1] if word not in IGNORED]
        space, operation = words if len(words) == 2 else ["generic", *words]
        space = SHARED.get(space, space)
        address = self.address(x[1], "u32" if space.startswith("shared") else "u64")
        other = f"const {own} other = {self.read(x[3], own)}; " if operation == "cas" else ""
        return (
            f"{{ {own}* const at = ({own}*){space}_at({address}, {{Access::store, {BYTES[own]}, {self.site()}}}); "
            f"const {own} old = *at, value = {self.read(x[2], own)}; {other}"
            f"*at = ({own})({ATOMICS[operation]}); {self.write(x[0], own, 'old')} }}"
        )

    def op_red(self, op, x):
        return self.op_atom(op, ["_", *x])

    def op_setp(self, op, x):
        own = TYPES[op[-1]]
        words = [word for word in op[1:-1] if word != "ftz"]
        if "ftz" in op or len(words) not in (1, 2):
            return None
        compare = f"{self.read(x[1], own)} {INT_COMPARISONS.get(words[0])} {self.read(x[2], own)}"
        if own in FLOATS:
            a, b = self.read(x[1], own), self.read(x[2], own)
            compare = f"[](f64 a, f64 b) {{ return {FLOAT_COMPARISONS[words[0]]}; }}({a}, {b})"
        elif words[0] not in INT_COMPARISONS:
            return None
        if len(words) == 2:  # combined with a predicate
            negated = x[3].startswith("!")
            symbol = {"and": "&", "or": "|", "xor": "^"}[words[1]]
            compare = f"({compare}) {symbol} {'!' * negated}{self.read(x[3].lstrip('!'), 'bool')}"
        return self.write(x[0], "bool", f"({compare})")

    def op_selp(self, op, x):
        own = TYPES[op[-1]]
        return self.write(x[0], own, f"{self.read(x[3], 'bool')} ? {self.read(x[1], own)} : {self.read(x[2], own)}")

    # add, sub, mul and fma without a rounding mode round to nearest, as those with .rn do.

    def arithmetic(self, symbol, op, x):
        return self.binary(symbol, op[-1], x) if op[1:-1] in ([], ["rn"]) else None

    def op_add(self, op, x):
        return self.arithmetic("+", op, x)

    def op_sub(self, op, x):
        return self.arithmetic("-", op, x)

    def op_mul(self, op, x):
        own = TYPES[op[-1]]
        if own in FLOATS:
            return self.arithmetic("*", op, x)
        a, b = self.read(x[1], own), self.read(x[2], own)
        if op[1] == "lo":
            return self.write(x[0], own, f"({own})((u64){a} * (u64){b})")
        if op[1] == "wide":
            return self.write(x[0], WIDER[own], f"({WIDER[own]}){a} * ({WIDER[own]}){b}")
        return self.call(f"mulhi_{own}", op[-1], x) if op[1] == "hi" else None

    def op_mad(self, op, x):
        own = TYPES[op[-1]]
        a, b = self.read(x[1], own), self.read(x[2], own)
        if op[1] == "lo":
            return self.write(x[0], own, f"({own})((u64){a} * (u64){b} + (u64){self.read(x[3], own)})")
        if op[1] == "wide":
            wide = WIDER[own]
            return self.write(x[0], wide, f"({wide}){a} * ({wide}){b} + {self.read(x[3], wide)}")
        return None

    def op_fma(self, op, x):
        if op[1:] == ["rm", "f32"]:
            return self.call("fma_rm_f32", "f32", x)
        functions = {"f32": "__builtin_fmaf", "f64": "__builtin_fma"}
        return self.call(functions[op[-1]], op[-1], x) if op[1:-1] == ["rn"] else None

    def op_div(self, op, x):
        own = TYPES[op[-1]]
        if own in FLOATS:
            if op[1:-1] == ["rn"]:
                return self.binary("/", op[-1], x)
            return self.call(f"div_{op[1]}_f32", "f32", x) if op[1:-1] in (["approx"], ["full"]) else None
        return self.call(f"div_{own}", op[-1], x)

    def op_rem(self, op, x):
        return self.call(f"rem_{TYPES[op[-1]]}", op[-1], x)

    def op_rcp(self, op, x):
        own = TYPES[op[-1]]
        if op[1:-1] == ["rn"]:
            return self.write(x[0], own, f"1 / {self.read(x[1], own)}")
        return self.approximate(op, x)

    def op_sqrt(self, op, x):
        if op[1:-1] == ["rn"]:
            return self.call("__builtin_sqrtf" if op[-1] == "f32" else "__builtin_sqrt", op[-1], x)
        return self.approximate(op, x)

    def approximate(self, op, x):
        return self.call("_".join(op), op[-1], x) if op[1] == "approx" else None

    op_rsqrt = op_ex2 = op_lg2 = op_tanh = approximate

    def op_min(self, op, x):
        own = TYPES[op[-1]]
        if len(op) > 2:
            return None
        if own in FLOATS:
            return self.call(f"{op[0]}_{own}", op[-1], x)
        a, b = self.read(x[1], own), self.read(x[2], own)
        return self.write(x[0], own, f"{a} {'<' if op[0] == 'min' else '>'} {b} ? {a} : {b}")

    op_max = op_min

    def op_abs(self, op, x):
        own = TYPES[op[-1]]
        if len(op) > 2:
            return None
        if own in FLOATS:
            return self.call("__builtin_fabsf" if own == "f32" else "__builtin_fabs", op[-1], x)
        value = self.read(x[1], own)
        return self.write(x[0], own, f"({own})({value} < 0 ? -(u64){value} : {value})")

    def op_neg(self, op, x):
        own = TYPES[op[-1]]
        return self.write(x[0], own, f"({own})-{'' if own in FLOATS else '(u64)'}{self.read(x[1], own)}")

    def op_copysign(self, op, x):
        return self.call(f"copysign_{op[-1]}", op[-1], x)

    def op_and(self, op, x):
        return self.binary("&", op[-1], x)

    def op_or(self, op, x):
        return self.binary("|", op[-1], x)

    def op_xor(self, op, x):
        return self.binary("^", op[-1], x)

    def op_not(self, op, x):
        own = TYPES[op[-1]]
        return self.write(x[0], own, f"({own}){'!' if own == 'bool' else '~'}{self.read(x[1], own)}")

    def op_shl(self, op, x):
        own = TYPES[op[-1]]
        return self.write(x[0], own, f"{op[0]}_{op[-1]}({self.read(x[1], own)}, {self.read(x[2], 'u32')})")

    def op_shr(self, op, x):
        return self.op_shl(["shr", op[-1].replace("b", "u")], x)

    def integer(self, op, x):
        return self.call("_".join(op), op[-1], x, "u32")

    op_popc = op_clz = op_brev = op_bfind = op_bfi = op_bfe = op_prmt = op_lop3 = integer

    def op_shf(self, op, x):
        return self.call(f"shf_{op[1]}_wrap", "u32", x) if op[2:] == ["wrap", "b32"] else None

    def op_cvta(self, op, x):
        value = self.read(x[1], "u64")
        if op[1:] == ["shared", "u64"]:
            value = f"kSharedWindow + {value}"
        elif op[1:] == ["to", "shared", "u64"]:
            value = f"{value} - kSharedWindow"
        elif op[-2] not in ("global", "local", "param"):
            return None
        return self.write(x[0], "u64", value)

    def op_cvt(self, op, x):
        """9.7.9.21."""
        to, of, words = op[-2], op[-1], op[1:-2]
        if to in ("bf16x2", "f16x2"):
            upper, lower = self.read(x[1], "f32"), self.read(x[2], "f32")
            return self.write(x[0], "u32", f"{to}_of({upper}, {lower})") if words == ["rn"] else None
        own, value = TYPES[to], self.read(x[1], TYPES[of])
        if to == "bf16":
            return self.write(x[0], "u16", f"bf16_of({value})") if (of, words) == ("f32", ["rn"]) else None
        if of == "bf16":
            return self.write(x[0], "f32", f"as_f32((u32){value} << 16)") if (to, words) == ("f32", []) else None
        if to in FLOATS and of in FLOATS:
            if words == ["sat"] and to == of == "f32":
                return self.write(x[0], own, f"saturate_f32({value})")
            if words in (["rni"], ["rmi"], ["rpi"], ["rzi"]) and to == of:
                function = {"rni": "nearbyint", "rmi": "floor", "rpi": "ceil", "rzi": "trunc"}[words[0]]
                return self.write(x[0], own, f"__builtin_{function}{'f' * (to == 'f32')}({value})")
            return self.write(x[0], own, f"({own}){value}") if words in ([], ["rn"]) else None
        if to in FLOATS:
            return self.write(x[0], own, f"({own}){value}") if words == ["rn"] else None
        if of in FLOATS:
            function = {"rni": "nearbyint", "rmi": "floor", "rpi": "ceil", "rzi": "trunc"}[words[0]]
            return self.write(x[0], own, f"{own}_of(__builtin_{function}({value}))") if len(words) == 1 else None
        return self.write(x[0], own, f"({own}){value}") if not words else None

    def op_bra(self, op, x):
        return f"goto {identifier(x[0])};"

    def op_ret(self, op, x):
        return "return;"

    def op_exit(self, op, x):
        return "return;" if self.is_kernel else None

    def op_call(self, op, x):
        self.calls = True
        results, x = (split(x[0][1:-1]), x[1:]) if x[0].startswith("(") else ([], x)
        arguments = split(x[1][1:-1]) if len(x) > 1 else []
        return f"f_{identifier(x[0])}(executed, {', '.join(results + arguments)});"

    # Threads.

    def op_bar(self, op, x):
        words = [word for word in op[1:] if word not in ("cta", "aligned")]
        if words == ["sync"]:
            threads = self.read(x[1], "u32") if len(x) > 1 else "0"
            return f"bar_sync({self.read(x[0], 'u32')}, {threads}, {self.site()});"
        if words == ["warp", "sync"]:
            return f"bar_warp_sync({self.read(x[0], 'u32')}, {self.site()});"
        if words[0] == "red" and x[1] == "0" and len(x) == 3:
            own = TYPES[words[2]]
            return self.write(x[0], own, f"bar_red_{words[1]}({self.read(x[2], 'bool')}, {self.site()})")
        return None

    def op_barrier(self, op, x):
        if op[1] != "cluster":
            return self.op_bar(op, x)
        if op[2] == "arrive":
            return f"barrier_cluster_arrive({'false' if 'relaxed' in op else 'true'}, {self.site()});"
        return f"barrier_cluster_wait({self.site()});" if op[2] == "wait" else None

    def op_shfl(self, op, x):
        if op[1] != "sync":
            return None
        to, _, valid = x[0].partition("|")
        operands = ", ".join(self.read(v, "u32") for v in x[1:])
        code = f"const Shuffled got = shfl_{op[2]}({operands}, {self.site()}); {self.write(to, 'u32', 'got.value')}"
        return f"{{ {code} {self.write(valid, 'bool', 'got.is_valid') if valid else ''} }}"

    def op_vote(self, op, x):
        negated = "!" * x[1].startswith("!")
        vote, mask = negated + self.read(x[1].lstrip("!"), "bool"), self.read(x[2], "u32")
        return self.write(x[0], TYPES[op[-1]], f"vote_{op[2]}({vote}, {mask}, {self.site()})")

    def op_redux(self, op, x):
        code = f"redux_{op[2]}({self.read(x[1], 'u32')}, {self.read(x[2], 'u32')}, {self.site()})"
        return self.write(x[0], "u32", code)

    def op_activemask(self, op, x):
        return self.write(x[0], "u32", "activemask()")

    # Fences order memory, which threads that take turns see in order anyway; griddepcontrol (9.7.13.13) lets a kernel
    # begin before the one ahead of it has ended, and here kernels run one after the other.

    def nothing(self, op, x):
        return "(void)0;"

    op_fence = op_membar = op_griddepcontrol = op_prefetch = nothing

    # Clusters and asynchronous copies.

    def op_mapa(self, op, x):
        rank = self.read(x[2], "u32")
        if op[1] == "shared::cluster":
            return self.write(x[0], TYPES[op[-1]], f"mapa({self.read(x[1], 'u32')}, {rank})")
        return self.write(x[0], "u64", f"mapa_generic({self.read(x[1], 'u64')}, {rank})")

    def op_cp(self, op, x):
        words = [word for word in op[2:] if not word.startswith("L2::")]
        if words == ["commit_group"]:
            return "cp_async_commit_group();"
        if words == ["wait_group"]:
            return f"cp_async_wait_group({self.read(x[0], 'u32')});"
        if words == ["wait_all"]:
            return "cp_async_commit_group(); cp_async_wait_group(0);"
        to, of, size = self.address(x[0], "u32"), self.address(x[1]), self.read(x[2], "u32")
        if words in (["ca", "shared", "global"], ["cg", "shared", "global"]):
            source_size = self.read(x[3], "u32") if len(x) > 3 else size
            return f"cp_async({to}, {of}, {size}, {source_size}, {self.site()});"
        bulk = ["bulk", "global", "mbarrier::complete_tx::bytes"]
        if [*words[:1], *words[2:]] == bulk and words[1] in ("shared::cluster", "shared::cta"):
            return f"cp_async_bulk({to}, {of}, {size}, {self.address(x[3], 'u32')}, {self.site()});"
        return None

    def op_mbarrier(self, op, x):
        """9.7.13.15. Of the state that an arrival returns, only the phase counts: its parity."""
        words = [word for word in op[1:-1] if word not in IGNORED and not word.startswith("shared")]
        if words in (["init"], ["inval"], ["expect_tx"]):
            operands = ", ".join([self.address(x[0], "u32"), *(self.read(v, "u32") for v in x[1:])])
            return f"mbarrier_{words[0]}({operands}, {self.site()});"
        if words[0] == "arrive":
            x = x if not x[0].startswith("[") else ["_", *x]
            address, operand = self.address(x[1], "u32"), self.read(x[2], "u32") if len(x) > 2 else None
            count, expected = ("1", operand) if words[1:] == ["expect_tx"] else (operand or "1", "0")
            return self.write(x[0], "u64", f"mbarrier_arrive({address}, {count}, {expected}, {self.site()})")
        if words in (["try_wait"], ["try_wait", "parity"]):
            operand = self.read(x[2], "u32" if "parity" in words else "u64")
            code = f"mbarrier_{'_'.join(words)}({self.address(x[1], 'u32')}, {operand}, {self.site()})"
            return self.write(x[0], "bool", code)
        return None


def unit_of(op: list[str]) -> str:
    """The unit of a multiprocessor that executes an instruction; README.md describes them."""
    base, kind = op[0], op[-1]
    is_approximate = "approx" in op or "full" in op
    if base in ("ld", "st"):
        spaces = [word for word in op if word.startswith(("global", "shared", "param", "local"))] or ["generic"]
        space = "remote" if spaces == ["shared::cluster"] else spaces[0].split("::")[0]
        return f"{'load' if base == 'ld' else 'store'}_{space}"
    if base in ("atom", "red"):
        return "atomic"
    if base in ("bra", "ret", "exit"):
        return "branch"
    if base in ("shfl", "vote", "redux", "activemask"):
        return "shuffle"
    if base in ("bar", "barrier", "fence", "membar", "griddepcontrol"):
        return "barrier"
    if base in ("cp", "mbarrier", "mapa", "prefetch"):
        return "async"
    if base in ("mov", "cvta"):
        return "move"
    if base in ("call", "div", "rem", "rcp", "sqrt", "rsqrt") and (not is_approximate or kind == "f64"):
        return "expanded:" + ".".join(op)
    if is_approximate:
        return "mufu"
    if base == "cvt":
        return "convert"
    if kind == "f64":
        return "fp64"
    if kind == "f32" and base in ("add", "sub", "mul", "fma"):
        return "fma"
    return "alu"


class Called:
    """The device functions of a PTX file, which each of its kernels that calls one gets a copy of."""

    def __init__(self):
        self.code, self.sites, self.mixes = "", [], []


def functions(text: str):
    """Yields header and body of each function, and None with the text between them."""
    end = 0
    for m in re.finditer(r"(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(entry|func)\b", text):
        if m.start() < end:
            continue
        yield None, text[end : m.start()]
        brace, semicolon = text.index("{", m.start()), text.find(";", m.start())
        if semicolon < brace:  # only declared
            end = semicolon + 1
            continue
        depth, end = 1, brace + 1
        while depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        yield text[m.start() : brace], text[brace + 1 : end - 1]
    yield None, text[end:]


def write_kernel(function: Function, code: str, path: Path, most_threads: int, cluster_size: int, alignment: int):
    sites = ", ".join('"' + text.replace('"', "'") + '"' for text in function.sites)
    parameters = ", ".join(f"{{{offset}, {size}}}" for offset, size in function.layout.values())
    rows = [f'{{{i}, "{unit}", {n}}}' for i, mix in enumerate(function.mixes) for unit, n in mix.items()]
    path.write_text(
        '#include "instructions.h"\n\nusing namespace ptx;\n\n'
        f"static u64 executed[{len(function.mixes)}];\n{function.called.code if function.calls else ''}"
        f"static void run(const u8* parameters) {{\n{code}\n}}\n\n"
        f"static const Parameter parameters[] = {{{parameters}}};\n"
        f"static const char* const sites[] = {{{sites}}};\n"
        f"static const Mix mixes[] = {{{', '.join(rows)}}};\n"
        f'static const Register add({{"{function.name}", run, parameters, {len(function.layout)}, '
        f"{function.static_shared}, {alignment}, {most_threads}, {cluster_size}, sites, executed, "
        f"{len(function.mixes)}, mixes, {len(rows)}}});\n"
    )


def translate_file(path: Path, folder: Path) -> list[str]:
    """Returns the names of the kernels."""
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.S))
    shared, alignment, called, kernels = {}, 16, Called(), []
    for header, body in functions(text):
        if header is None:
            for part in body.split(";"):
                part = " ".join(re.sub(r"\.(version|target|address_size)\s+.*", " ", part).split())
                if m := re.match(r"\.extern \.shared \.align (\d+) \.b8 ([\w$]+)\[\]", part):
                    shared[m[2]], alignment = None, max(alignment, int(m[1]))
                elif variable := static_shared(part):
                    shared |= [variable]
                elif part:
                    raise Unknown(f"{path}: {part[:200]}")
            continue
        kind, result, name, parameters, rest = re.match(
            r".*?\.(entry|func)\s*(?:\((.*?)\)\s*)?([\w$]+)\s*\((.*?)\)(.*)$", header, re.S
        ).groups()
        parameters = [" ".join(parameter.split()) for parameter in split(parameters)]
        results = [" ".join(result.split())] if result else []
        function = Function(name, results + parameters, kind == "entry", shared, called)
        if kind == "func":
            function.translate(body)
            takes = ", ".join(["u64* executed", *(f"u8* {parameter}" for parameter in function.layout)])
            called.code += f"static void f_{identifier(name)}({takes}) {{\n" + "\n".join(function.lines) + "\n}\n\n"
            called.sites, called.mixes = function.sites, function.mixes
        else:
            kernels.append((function, body, rest))
    for function, body, rest in kernels:  # after the functions that they call, wherever those stand
        function.sites, function.mixes = list(called.sites), list(called.mixes)
        function.translate(body)
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", rest)
        cluster = re.search(r"\.reqnctapercluster\s+(\d+)", rest)
        write_kernel(
            function,
            "\n".join(function.lines),
            folder / f"{path.stem}_{kernels.index((function, body, rest))}.cpp",
            int(threads[1]) if threads else 1024,
            int(cluster[1]) if cluster else 1,
            alignment,
        )
    return [function.name for function, _, _ in kernels]


def main(folder: str, *files: str):
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        kernels = [kernel for file in files for kernel in translate_file(Path(file), Path(folder))]
    except Unknown as error:
        sys.exit(f"cannot translate {error}")
    print(f"{len(kernels)} kernels")


if __name__ == "__main__":
    main(*sys.argv[1:])
