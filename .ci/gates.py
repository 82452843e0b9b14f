"""The gates of this book: `gates.py test` or `gates.py check` runs them in order, `gates.py test words imports` only those named."""
import ast, atexit, functools, json, os, re, shutil, subprocess, symtable, sys, tempfile, time, traceback, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PYTHON = sys.executable

COVERED = 80  # per cent of the lines of pytc/ that its notebooks must run
HEAVY = {"torch", "monai", "lightning", "cellmap_data"}  # seconds each, so they stay out of `import pytc` and of `pytc --help`
VERBS = "train predict decode evaluate tune sweep run submit lint score view report demo download doctor".split()
FIB25 = {"voi_sum": 1.6, "error": 0.25}  # a run on real data must score below these
PICTURE = 100_000  # bytes; a picture in a notebook stays in the repository for ever

# Nothing of the caller's shell may change what is tested: its git, its PYTHONPATH, nbdev's own switch.
ENV = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH", "PYTHONHOME") and not k.startswith("GIT_")}
ENV |= {"PATH": f"{BIN}{os.pathsep}{ENV['PATH']}"}


class Failed(Exception):
    "What is wrong, and what to do."


def run(*command, cwd, env=ENV, minutes=20):
    "What a command said, or `Failed` with the end of it."
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # a pipe would wait for a worker that the command left behind
        try: code = subprocess.run([*map(str, command)], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
                                   timeout=60 * minutes).returncode
        except subprocess.TimeoutExpired: code = f"none within {minutes} minutes"
        said.seek(0)
        text = said.read()
    if code: raise Failed(f"{Path(command[0]).name} {' '.join(map(str, command[1:]))}: exit code {code}\n" + "\n".join(text.splitlines()[-40:]))
    return text


# ---- a copy of the working tree, so that no gate touches a file of yours

@functools.cache
def tree():
    "The folder of the copy: what git tracks or would track, as it stands now, in a git index of its own."
    files = run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT).split("\0")
    copy = Path(tempfile.mkdtemp(prefix="pytc-")).resolve()
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for file in files:
        if not os.path.lexists(ROOT / file) or not file: continue  # deleted, not yet committed
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file, follow_symlinks=False)
    run("git", "init", "-q", cwd=copy)
    run("git", "add", "-Af", cwd=copy)
    return copy


def git(*arguments): return run("git", *arguments, cwd=tree())


def unchanged(advice):
    "Fail with `advice` if the copy differs from the working tree; either way it is as before afterwards."
    changed = sorted(set(git("ls-files", "-mdo", "--exclude-standard").splitlines()))
    diff = git("diff", "--unified=0").splitlines()[:20]
    git("checkout-index", "-af"); git("clean", "-fdq")
    if changed: raise Failed("\n".join([f"{advice}: {', '.join(changed)}", *diff]))


# ---- notebooks

def code_of(path):
    "The source of each code cell, `{cell: source}` by its place."
    try: cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError) as error: raise Failed(f"{path.name} is not a notebook ({error}); restore it from git") from error
    return {i: "".join(cell["source"]) for i, cell in enumerate(cells) if cell["cell_type"] == "code"}


def chapters(flag=None): 
    "Notebooks that have code to run; with `flag`, only those with a cell flagged so."
    paths = {p: "\n".join(code_of(p).values()) for p in sorted((tree() / "nbs").glob("*.ipynb"))}
    return [p for p, code in paths.items() if re.search(rf"^#\|\s*{flag}\b" if flag else r"\S", code, re.M)]


def directive(name, source):
    "What follows `#| name` in a cell, `''` if nothing does, None without that directive."
    found = re.search(rf"^\s*#\s*\|\s*{name}\b[ \t]*(\S*)", source, re.M)
    return found and found[1]


def module_of(path): return next(filter(None, (directive("default_exp", source) for source in code_of(path).values())), None)


def run_notebooks(paths, flags="", under=()):
    "Run each by nbdev_test in a process of its own, two at a time; says how many ran and which took longest."
    # On a CPU and offline is how a reader has the book: no GPU is visible, and the way out leads nowhere.
    env = ENV | {"MPLBACKEND": "Agg", "PYTHONPATH": str(tree()), "CUDA_VISIBLE_DEVICES": "", "no_proxy": "localhost,127.0.0.1"}
    env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
    env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")

    def one(path):
        begun = time.time()
        # nbdev_test exits 0 without a notebook to test; only one that it executes is announced by "Starting".
        try:
            said = run(PYTHON, *under, BIN / "nbdev_test", "--path", path, "--do_print", "--flags", flags, cwd=tree(), env=env)
            missed = not re.search(rf"^Starting .*{re.escape(path.name)}$", said, re.M) or not re.search("^Success.$", said, re.M)
            problem = "nbdev_test ran none of its cells (skip_exec, or a name that begins with _)" if missed else ""
        except Failed as failure: problem = str(failure)
        COUNT[not problem] += 1
        return time.time() - begun, path.stem, problem

    with ThreadPoolExecutor(2) as pool: results = list(pool.map(one, paths))
    failed = [f"{name}: {problem}" for _, name, problem in results if problem]
    if failed: raise Failed(f"{len(failed)} of {len(results)} notebooks; nbdev_test --path nbs/NAME.ipynb shows it alone\n" + "\n".join(failed))
    return f"{len(results)} notebooks" + (", longest {1} {0:.0f} s".format(*max(results)) if results else "")


def on_package(source, module):
    "An exported cell as a reader of the package would write it: the names that it defines, imported."
    exported = [to for to in (directive(name, source) for name in ("export", "exporti", "exports")) if to is not None]
    if not exported: return source
    module = f"pytc.{exported[0] or module}"
    code = re.sub(r"^\s*%.*", "", source, flags=re.M)  # nbdev drops magics as well
    names = [s.get_name() for s in symtable.symtable(code, module, "exec").get_symbols() if s.is_assigned() or s.is_imported()]
    directives = re.match(r"(\s*#\s*\|.*\n)*", source)[0]
    return directives + (f"from {module} import {', '.join(names)}" if names else f"import {module}")


# ---- the gates of `make test`

def clean():
    "Notebooks are as nbdev_clean leaves them, and job notebooks are sources: one `parameters` cell, no outputs."
    for folder in ("nbs", "tutorials"): run(BIN / "nbdev_clean", "--fname", folder, cwd=tree())
    unchanged("run nbdev_clean, and nbdev_clean --fname tutorials, then commit")
    jobs = sorted((tree() / "tutorials").glob("*.ipynb"))
    for path in jobs + sorted((tree() / "nbs").glob("*.ipynb")):
        cells = [json.loads(path.read_text(encoding="utf-8"))["cells"][i] for i in code_of(path)]
        if any(cell["execution_count"] for cell in cells): raise Failed(f"{path.name} has execution counts; run nbdev_clean")
        if path not in jobs: continue
        if any(cell["outputs"] for cell in cells): raise Failed(f"tutorials/{path.name} has outputs; run nbdev_clean --clear_all on it")
        tagged = sum("parameters" in cell["metadata"].get("tags", []) for cell in cells)
        if tagged != 1: raise Failed(f"tutorials/{path.name} has {tagged} cells tagged `parameters`; papermill needs exactly one")
    return f"{len(jobs)} job notebooks"


def export():
    "pytc/, made anew from the notebooks, is what is committed."
    for module in (tree() / "pytc").glob("*.py"): module.unlink()
    run(BIN / "nbdev_export", cwd=tree())
    unchanged("pytc/ is written by nbdev_export: edit the notebook, export, commit both; nobody edits these by hand")


def notebooks():
    "Every notebook runs, on a CPU and offline, and leaves no file behind."
    if not chapters(): raise Failed("no notebook in nbs/ has code")
    said = run_notebooks(chapters())
    unchanged("a notebook wrote here; let it write into a temporary folder")
    return said


def package():
    "The same tests with every exported cell replaced by an import, so that pytc/ itself is tested, and measured."
    copy = shutil.copytree(tree() / "nbs", tree() / "nbs_package", symlinks=True)
    for path in chapters():
        notebook, module = json.loads(path.read_text(encoding="utf-8")), module_of(path)
        for i, source in code_of(path).items(): notebook["cells"][i]["source"] = on_package(source, module)
        (copy / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    # The bodies of compiled kernels run where Python cannot see them.
    (tree() / ".coveragerc").write_text(f"[run]\nsource = {tree()}/pytc\nomit = */_modidx.py\nparallel = true\ndata_file = {tree()}/.coverage\n"
                                        "patch = subprocess\n[report]\nexclude_also = @(\\w+\\.)?(n?jit|vectorize|guvectorize)\\b\n")
    said = run_notebooks([copy / path.name for path in chapters()], under=("-m", "coverage", "run", f"--rcfile={tree()}/.coveragerc"))
    run(PYTHON, "-m", "coverage", "combine", "-q", cwd=tree())
    table = run(PYTHON, "-m", "coverage", "report", cwd=tree()).strip()
    covered = int(run(PYTHON, "-m", "coverage", "report", "--format=total", cwd=tree()))
    if covered < COVERED: raise Failed(f"notebooks run {covered} % of pytc/, and it takes {COVERED} %; add checks to the chapters that miss most\n{table}")
    return f"{said}, {covered} % of pytc/ run\n{table}"


def imports():
    "Every module imports alone; each imports only modules of earlier notebooks; the light ones load nothing heavy."
    notebooks = {module_of(path): path for path in chapters() if module_of(path)}
    modules = {path.stem: path for path in sorted((tree() / "pytc").glob("*.py")) if not path.stem.startswith("_")}
    wrong = [f"notebook {p.name} has no pytc/{m}.py; run nbdev_export" for m, p in notebooks.items() if m not in modules]
    wrong += [f"pytc/{m}.py has no notebook; remove it, or write the notebook" for m in modules if m not in notebooks]
    place = {module: re.match(rf"(\d+)([a-z]?)_{module}$", path.stem) for module, path in notebooks.items()}
    wrong += [f"{notebooks[m].name} must be called NUMBER_{m}.ipynb" for m, found in place.items() if not found]
    place = {module: (int(found[1]), found[2]) for module, found in place.items() if found}
    for module, other in ((m, o) for m in place.keys() & modules.keys() for o in imported(modules[m]) & place.keys()):
        if place[other] >= place[module]: wrong.append(f"pytc.{module} imports pytc.{other}, which stands in {notebooks[other].name}: import only from earlier")
    if wrong: raise Failed("\n".join(wrong))

    def alone(module):
        script = f"import sys, pytc{module and '.'}{module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
        heavy = run(PYTHON, "-c", script, cwd=tree()).splitlines()[-1]
        return module in ("", "cli") and heavy and f"import pytc{module and '.'}{module} loads {heavy}; import those inside the functions that need them"
    with ThreadPoolExecutor(2) as pool: wrong = [w for w in pool.map(alone, ["", *modules]) if w]
    if wrong: raise Failed("\n".join(wrong))
    return f"{len(modules)} modules"


def imported(path):
    "The modules of pytc that a module's source names in an import, in functions too."
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["pytc" if node.level else "", node.module]))
            names += [base] + [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name): names.append(f"{node.value.id}.{node.attr}")
    return {name.split(".")[1] for name in names if name.startswith("pytc.")}


def wheel():
    "A wheel carries the code and the job notebooks, and works where there is no checkout."
    with tempfile.TemporaryDirectory(prefix="pytc-wheel-") as tmp:
        tmp = Path(tmp).resolve()
        run(PYTHON, "-m", "build", "--no-isolation", "--outdir", tmp, cwd=tree())  # the wheel is built from the sdist: both are whole
        built, = tmp.glob("*.whl")
        want = {f"pytc/{p.name}": p for p in (tree() / "pytc").glob("*.py")}
        want |= {f"pytc/tutorials/{p.relative_to(tree() / 'tutorials')}": p for p in (tree() / "tutorials").rglob("*") if p.is_file()}
        with zipfile.ZipFile(built) as archive:
            have = {name for name in archive.namelist() if name.startswith("pytc/")}
            wrong = [f"lacks {n}" for n in want.keys() - have] + [f"has {n} too" for n in have - want.keys()]
            wrong += [f"has another {n}" for n in want.keys() & have if archive.read(n) != want[n].read_bytes()]
        if wrong: raise Failed(f"{built.name} {', '.join(sorted(wrong))}; see package_data in setup.py and MANIFEST.in")

        run(PYTHON, "-m", "venv", tmp / "venv", cwd=tmp)
        python, (site,) = tmp / "venv/bin/python", (tmp / "venv").glob("lib/python*/site-packages")
        run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", built, cwd=tmp)
        packages, = BIN.parent.glob("lib/python*/site-packages")
        (site / "everything_else.pth").write_text(f"{packages}\n")  # read after this folder, and without its own .pth files: no checkout
        modules = ["pytc", *(f"pytc.{p.stem}" for p in (tree() / "pytc").glob("*.py") if p.stem != "__init__")]
        script = "import importlib, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]), sep='\\n')"
        places = run(python, "-c", script, *modules, cwd=tmp).splitlines()[-len(modules):]
        if any(not place.startswith(str(site)) for place in places): raise Failed(f"imported from elsewhere than the wheel: {places}")

        begun = time.time()
        said = run(tmp / "venv/bin/pytc", "--help", cwd=tmp)
        if lost := [verb for verb in VERBS if not re.search(rf"^\W*{verb}\b", said, re.M)]: raise Failed(f"pytc --help lists no {', '.join(lost)}")
        return f"{built.name}, {len(want)} files; pytc --help takes {time.time() - begun:.1f} s"


def words():
    "No tracked file names a home folder or this checkout; no notebook shows what differs from run to run, or an error."
    home = re.compile(r"(?<![\w.])/(?:home|Users)/\w|(?<![\w.])/root\b(?=/)" + (f"|{re.escape(str(ROOT))}\\b" if len(ROOT.parts) > 2 else ""))
    wrong = []
    for path in (tree() / name for name in git("ls-files").splitlines()):
        if path.is_symlink(): continue
        lines = path.read_bytes().decode("utf-8", "ignore").splitlines()
        wrong += [f"{path.relative_to(tree())}:{i} names {found[0]}…; say it relative to the project" for i, line in enumerate(lines, 1)
                  if (found := home.search(line))]
        if path.suffix != ".ipynb": continue
        for i in code_of(path):
            for output in json.loads("\n".join(lines))["cells"][i]["outputs"]:
                pictures = {k: v for k, v in output.get("data", {}).items() if k.startswith("image/")}
                if any(len("".join(v)) * 3 // 4 > PICTURE for v in pictures.values()): wrong.append(f"{path.name}, cell {i}: a picture above {PICTURE} bytes; lower its dpi")
                text = json.dumps(output | {"data": {k: v for k, v in output.get("data", {}).items() if k not in pictures}})
                if found := re.search(r"/tmp/|0x7f|Traceback \(most recent|\"output_type\": \"error\"", text):
                    wrong.append(f"{path.name}, cell {i}: its output shows {found[0]}; print what is the same on every machine")
    if wrong: raise Failed("\n".join(wrong))


# ---- the gates of `make check`

def slow():
    "Notebooks with `#| slow` cells run with those."
    return run_notebooks(chapters("slow"), flags="slow")


def demo():
    "`pytc demo` goes from nothing to a score."
    with tempfile.TemporaryDirectory(prefix="pytc-demo-") as tmp: return run(BIN / "pytc", "demo", cwd=tmp, minutes=30).strip()


def fib25():
    "Training on real tissue gives the scores that the README promises."
    if not os.environ.get("PYTC_DATA"): return "skipped: PYTC_DATA is not set"
    with tempfile.TemporaryDirectory(prefix="pytc-fib25-") as tmp:
        run(BIN / "pytc", "train", "tutorials/fib25.yaml", "--run-dir", tmp, cwd=ROOT, minutes=60)
        scores = json.loads((Path(tmp) / "scores.json").read_text(encoding="utf-8"))
    table = "\n".join(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}" for name, value in scores.items())
    wrong = [f"{name} is {scores.get(name)}, and must be below {bound}" for name, bound in FIB25.items() if not scores.get(name, bound) < bound]
    if wrong: raise Failed("; ".join(wrong) + f"\n{table}")
    return f"below {FIB25}\n{table}"


GATES = {"test": (clean, export, words, notebooks, package, imports, wheel), "check": (slow, demo, fib25)}
COUNT = {True: 0, False: 0}  # of gates and of notebooks


def main(suite="", *names):
    "Run a suite; each gate prints a line, and its details below when it has some."
    known = [gate.__name__ for gate in GATES.get(suite, ())]
    if not known or set(names) - set(known): sys.exit(f"gates.py {' '.join((suite, *names))}: write {' or '.join(GATES)}, then any of {known}")
    for gate in GATES[suite]:
        if names and gate.__name__ not in names: continue
        begun = time.time()
        try: passed, said = True, gate() or ""
        except Failed as failure: passed, said = False, str(failure)
        except Exception: passed, said = False, traceback.format_exc()  # a gate that breaks has not passed
        COUNT[passed] += 1
        head, *details = said.splitlines() or [""]
        print(f"{'ok  ' if passed else 'FAIL'}  {gate.__name__} ({time.time() - begun:.0f} s){': ' + head if head else ''}", *details, sep="\n      ", flush=True)
    print(f"{COUNT[True]} passed, {COUNT[False]} failed")
    sys.exit(COUNT[False] > 0)


if __name__ == "__main__": main(*sys.argv[1:])
