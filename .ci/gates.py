"""The gates of this book: `gates.py test` or `gates.py check` runs them in order, `gates.py test words imports` only those named."""
import ast, atexit, functools, importlib, json, os, re, shutil, signal, subprocess, symtable, sys, tempfile, time, traceback, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT, PYTHON, BIN = Path(__file__).resolve().parents[1], sys.executable, Path(sys.executable).parent
COVERED = 80  # per cent of the lines of pytc/ that its notebooks must run
HEAVY = {"torch", "monai", "lightning", "cellmap_data"}  # seconds each, so they stay out of `import pytc` and of `pytc --help`
PRELOADED = "torch lightning.pytorch torchmetrics monai.transforms monai.networks.nets matplotlib.pyplot numba scipy.ndimage scipy.stats hypothesis IPython".split()
VERBS = "train predict decode corrections evaluate suspects validate tune fetch split submit package lint score report info convert plan doctor download demo".split()
FIB25 = {"voi_sum": 1.6, "adapted_rand_error": 0.25}  # a run on real tissue must score below these

# Nothing of the caller's shell may change what is tested: its git, its PYTHONPATH, nbdev's own switch. Without
# bytecode every process would compile torch and monai again, which takes longer than most notebooks.
ENV = {k: v for k, v in os.environ.items() if not re.match("GIT_|IN_TEST$|PYTHON(PATH|HOME|SAFEPATH|DONTWRITEBYTECODE)$", k)}
ENV["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"

class Failed(Exception): "What is wrong, and what to do."

def refuse(problems):
    if problems: raise Failed("\n".join(problems))

def run(*command, cwd, env=ENV, minutes=20):
    "What a command said, or `Failed` with the end of it."
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # a pipe would wait for a worker that the command left behind
        both = dict(stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
        try: code = subprocess.run([*map(str, command)], cwd=cwd, env=env, timeout=60 * minutes, **both).returncode
        except subprocess.TimeoutExpired: code = f"none within {minutes} minutes"
        said.seek(0)
        text = re.sub(r"\x1b\[[\d;]*m", "", said.read())  # colours
    if code: refuse([f"{' '.join(Path(c).name for c in map(str, command[:4]))} …: exit code {code}", *text.splitlines()[-40:]])
    return text

def two_at_a_time(function, items):
    with ThreadPoolExecutor(2) as pool: return list(pool.map(function, items))

# ---- a copy of the working tree, so that no gate touches a file of yours
@functools.cache
def tree():
    "The folder of the copy: what git tracks or would track, as it stands now, in a git index of its own."
    copy = Path(tempfile.mkdtemp(prefix="pytc-")).resolve()
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for file in run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT).split("\0"):
        if not file or not os.path.lexists(ROOT / file): continue  # deleted, and that not yet committed
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file, follow_symlinks=False)
    for command in (["init", "-q"], ["add", "-Af"]): run("git", *command, cwd=copy)
    return copy

def unchanged(advice):
    "Fail with `advice` if the copy is no longer as it was made; either way it is so again afterwards."
    git = lambda *arguments: run("git", *arguments, cwd=tree()).splitlines()
    changed, diff = sorted(set(git("ls-files", "-mdo", "--exclude-standard"))), git("diff", "--unified=0")
    for command in (["checkout-index", "-af"], ["clean", "-fdq"]): git(*command)
    if changed: refuse([f"{advice}: {', '.join(changed)}", *diff[:20]])

# ---- notebooks
def notebook(path):
    "Its JSON, with every source in one piece."
    try: content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error: raise Failed(f"{path.name} is not a notebook ({error}); restore it from git") from error
    for cell in content["cells"]: cell["source"] = "".join(cell["source"])
    return content

def code_cells(path): return [cell for cell in notebook(path)["cells"] if cell["cell_type"] == "code"]
def directives(source): return re.match(r"(\s*#\s*\|.*(\n|$))*", source)[0]

def directive(name, cell):
    "What follows `#| name` at the head of a cell, `''` if nothing does, None where the cell has no such directive."
    found = re.search(rf"^\s*#\s*\|\s*{name}\b[ \t]*(\S*)", directives(cell["source"]), re.M)
    return found and found[1]

def left_out(path): return any(re.search(r"^\W*skip_exec:\s*true", cell["source"], re.M) for cell in notebook(path)["cells"][:2])
def chapters(): return [path for path in sorted(tree().glob("nbs/*.ipynb")) if code_cells(path) and not left_out(path)]
def module_of(path): return next((to for cell in code_cells(path) if (to := directive("default_exp", cell))), None)

def passed(said, path):
    "Whether nbdev_test ran all of a notebook: it exits 0 when it tested nothing, but announces what it starts, and \"Success.\" after all."
    return re.search(rf"^Starting .*/{path.name}\n(.*\n)*Success\.$", said, re.M)

def fork(logs, *paths):
    "Run notebooks in forks of this process, which has imported what takes most of them seconds; prints [path, exit code, seconds] of each."
    for name in PRELOADED: importlib.import_module(name)
    from nbdev.test import nbdev_test
    waiting, running = list(paths), {}
    while waiting or running:
        while waiting and len(running) < 2:
            path = waiting.pop(0)
            if not (child := os.fork()):
                signal.alarm(20 * 60)
                log = os.open(Path(logs) / Path(path).name, os.O_CREAT | os.O_WRONLY)
                for stream in (1, 2): os.dup2(log, stream)
                return nbdev_test(path=path, do_print=True)
            running[child] = path, time.time()
        child, status = os.wait()
        path, begun = running.pop(child)
        print(json.dumps([path, os.waitstatus_to_exitcode(status), time.time() - begun]), flush=True)

def run_forked(paths, env):
    "(seconds, path) of the notebooks that pass in forks."
    with tempfile.TemporaryDirectory(prefix="pytc-logs-") as logs:
        said = run(PYTHON, __file__, "fork", logs, *paths, cwd=tree(), env=env, minutes=40)
        done = [(seconds, Path(path)) for path, code, seconds in map(json.loads, re.findall(r"^\[.*\]$", said, re.M)) if code == 0]
        return [(seconds, path) for seconds, path in done if passed((Path(logs) / path.name).read_text(errors="replace"), path)]

def run_notebooks(paths, flags="", under=(), forked=False):
    "Run each by nbdev_test in a process of its own, forks first if allowed; says how many ran and which took longest."
    # A CPU and no network is how a reader has the book: no GPU is visible, and the way out leads nowhere.
    env = ENV | {"PYTHONPATH": str(tree()), "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": "", "no_proxy": "localhost,127.0.0.1"}
    env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    def one(path):
        begun, problem = time.time(), ""
        try: said = run(PYTHON, *under, BIN / "nbdev_test", "--path", path, "--do_print", "--flags", flags, cwd=tree(), env=env, minutes=40 if flags else 20)
        except Failed as failure: problem = str(failure)
        else: problem = "" if passed(said, path) else "nbdev_test did not run all of it"
        return time.time() - begun, path.stem, problem
    # IPython keeps the compiled kernels of cells there, and would run an old one after a function that it calls has changed.
    with tempfile.TemporaryDirectory(prefix="pytc-cache-") as env["XDG_CACHE_HOME"]:
        # A fork may fail where a process of its own does not; what fails is run again in one, and that counts.
        quick = run_forked(paths, env) if forked else []
        results = [(seconds, path.stem, "") for seconds, path in quick] + two_at_a_time(one, [path for path in paths if path not in [path for _, path in quick]])
    failed = [f"{name}: {problem}" for _, name, problem in results if problem]
    COUNT[True], COUNT[False] = COUNT[True] + len(results) - len(failed), COUNT[False] + len(failed)
    if failed: refuse([f"{len(failed)} of {len(results)} notebooks; to see one alone: .venv/bin/nbdev_test --path nbs/NAME.ipynb", *failed])
    return f"{len(results)} notebooks" + (", longest {1} {0:.0f} s".format(*max(results)) if results else "")

def on_package(cell, module):
    "The source of a code cell; of an exported one, the import of all names that it defines."
    exported = [to for name in ("export", "exporti", "exports") if (to := directive(name, cell)) is not None]
    if not exported: return cell["source"]
    module = f"pytc.{exported[0] or module}"
    code = re.sub(r"^\s*%.*", "", cell["source"], flags=re.M)  # as nbdev_export drops magics
    names = [s.get_name() for s in symtable.symtable(code, module, "exec").get_symbols() if s.is_assigned() or s.is_imported()]
    return directives(cell["source"]) + (f"from {module} import {', '.join(names)}" if names else f"import {module}")

# ---- the gates of `make test`
def clean():
    "Notebooks are as nbdev_clean leaves them; job notebooks are sources: no outputs, and one cell for papermill to set."
    for folder in ("nbs", "tutorials"): run(BIN / "nbdev_clean", "--fname", folder, cwd=tree())
    unchanged("run nbdev_clean, and nbdev_clean --fname tutorials, then commit")
    jobs = sorted(tree().glob("tutorials/*.ipynb"))
    refuse([f"{path.name} has execution counts; run nbdev_clean" for path in tree().glob("*/*.ipynb")
            if any(cell["execution_count"] for cell in code_cells(path))])
    refuse([f"{path.name} is a source and has outputs; run jupyter nbconvert --clear-output --inplace on it" for path in jobs
            if any(cell["outputs"] for cell in code_cells(path))])
    tagged = {path.name: sum("parameters" in cell["metadata"].get("tags", []) for cell in code_cells(path)) for path in jobs}
    refuse([f"{name} has {n} cells tagged `parameters`; papermill needs exactly one" for name, n in tagged.items() if n != 1])
    return f"{len(jobs)} job notebooks"

def export():
    "pytc/ and README.md, made anew from the notebooks, are what is committed."
    for module in (tree() / "pytc").glob("*.py"): module.unlink()
    run(BIN / "nbdev_export", cwd=tree())
    unchanged("pytc/ is written by nbdev_export; edit the notebook, not these, then export and commit both")
    run(PYTHON, ".ci/readme.py", cwd=tree())
    unchanged("README.md is written by .ci/readme.py; edit nbs/index.ipynb, run make readme, then commit both")

def words():
    "No tracked file names a home folder or this checkout; no notebook shows an error, or what differs from run to run."
    home = r"(?<![\w.])(/(home|Users)/\w|/root\b(?=/)" + (rf"|{re.escape(str(ROOT))}\b)" if len(ROOT.parts) > 2 else ")")
    wrong = []
    for name in run("git", "ls-files", cwd=tree()).splitlines():
        if (path := tree() / name).is_symlink(): continue
        for number, line in enumerate(path.read_bytes().decode("utf-8", "ignore").splitlines(), 1):
            if found := re.search(home, line): wrong.append(f"{name}:{number} names {found[0]}; write it relative to the project")
        for output in [output for cell in code_cells(path) for output in cell["outputs"]] if path.suffix == ".ipynb" else ():
            said = {kind: data for kind, data in output.pop("data", {}).items() if not kind.startswith("image/")}
            if found := re.search(r'/tmp/|0x7f|Traceback \(most recent|"output_type": "error"', json.dumps([output, said])):
                wrong.append(f"{name}: an output shows {found[0]}; print what is the same on every machine, and no error")
    refuse(wrong)

def imports():
    "Every module has a notebook and imports only modules of earlier ones (so there are no cycles); the light ones stay light."
    notebooks = {module: path.stem for path in tree().glob("nbs/*.ipynb") if (module := module_of(path))}
    modules = {path.stem: path for path in sorted((tree() / "pytc").glob("[!_]*.py"))}
    refuse([f"pytc/{name}.py and NUMBER_{name}.ipynb: only one of both is there" for name in sorted(notebooks.keys() ^ modules.keys())])
    place = {module: re.match(rf"(\d+)([a-z]?)_{module}$", stem) for module, stem in notebooks.items()}
    refuse([f"{notebooks[m]}.ipynb exports pytc.{m} and so must be called NUMBER_{m}.ipynb" for m, found in place.items() if not found])
    place = {module: (int(found[1]), found[2]) for module, found in place.items()}
    refuse([f"pytc.{m} imports pytc.{other} of {notebooks[other]}.ipynb; import only from notebooks before {notebooks[m]}.ipynb"
            for m, path in modules.items() for other in sorted(imported(path) & place.keys()) if place[other] >= place[m]])
    for module in ("pytc", *(["pytc.cli"] if "cli" in modules else [])):
        loaded = run(PYTHON, "-c", f"import sys, {module}; print('\\n', *sys.modules)", cwd=tree()).splitlines()[-1].split()
        refuse([f"import {module} loads {name}; import that inside the functions that need it" for name in sorted(HEAVY & set(loaded))])
    return f"{len(modules)} modules"

def imported(path):
    "The modules of pytc that a module's source names, in functions too."
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["pytc" if node.level else "", node.module]))
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return {name.split(".")[1] for name in names if name.startswith("pytc.")}

def notebooks():
    "Every notebook runs, on a CPU and offline, and leaves no file behind."
    if not chapters(): raise Failed("no notebook in nbs/ has code; is this the whole checkout?")
    said = [run_notebooks(chapters(), forked=True), *(f"{path.stem} left out by its skip_exec" for path in tree().glob("nbs/*.ipynb") if left_out(path))]
    unchanged("a notebook wrote into the project; let it write into a temporary folder")
    return ", ".join(said)

def wheel():
    "A wheel carries the code and the job notebooks; without a checkout, every module imports and the command answers."
    with tempfile.TemporaryDirectory(prefix="pytc-wheel-") as tmp:
        tmp = Path(tmp).resolve()
        run(PYTHON, "-m", "build", "--no-isolation", "--outdir", tmp, cwd=tree())  # makes the wheel from the sdist, so both are whole
        built, = tmp.glob("*.whl")
        want = {f"pytc/{path.name}": path.read_bytes() for path in tree().glob("pytc/*.py")}
        want |= {f"pytc/{path.relative_to(tree())}": path.read_bytes() for path in tree().glob("tutorials/**/*") if path.is_file()}
        with zipfile.ZipFile(built) as archive: have = {name: archive.read(name) for name in archive.namelist() if name.startswith("pytc/")}
        wrong = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
        if wrong: raise Failed(f"wheel and tree differ in {', '.join(wrong)}; see package_data in setup.py, and MANIFEST.in")
        python = tmp / "venv/bin/python"
        run(PYTHON, "-m", "venv", "--without-pip", tmp / "venv", cwd=tmp)
        run(PYTHON, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", built, cwd=tmp)
        (site,), (others,) = (folder.glob("lib/python*/site-packages") for folder in (tmp / "venv", BIN.parent))
        (site / "others.pth").write_text(f"{others}\n")  # searched last, and its .pth files are not read: no checkout
        modules = ["pytc", *(f"pytc.{path.stem}" for path in sorted(tree().glob("pytc/[!_]*.py")))]
        # One process for all, as the libraries behind them take long; the last first, so that none is there already.
        code = f"import importlib\nfor name in {modules[::-1]}: print('\\n' + importlib.import_module(name).__file__)"
        places = [line for line in run(python, "-c", code, cwd=tmp).splitlines() if "pytc" in line and line.endswith(".py")]
        refuse([f"found {path} instead of the wheel's" for path in places if not path.startswith(str(site))])
        if len(places) < len(modules): raise Failed(f"{len(places)} of {len(modules)} modules could be imported")
        begun = time.time()
        said, took = run(tmp / "venv/bin/pytc", "--help", cwd=tmp), time.time() - begun
        lost = [verb for verb in VERBS if not re.search(rf"^\W*{verb}\b", said, re.M)]
        if lost: raise Failed(f"pytc --help does not list {', '.join(lost)}")
    return f"{len(want)} files, {len(modules)} modules; pytc --help takes {took:.1f} s"

# ---- the gates of `make check`
def package():
    "All cells, the slow ones too, with every exported one replaced by an import, so that pytc/ itself is tested, and measured."
    copy = shutil.copytree(tree() / "nbs", tree() / "nbs_package", symlinks=True)
    for path in chapters():
        content, module = notebook(path), module_of(path)
        for cell in content["cells"]:
            if cell["cell_type"] == "code": cell["source"] = on_package(cell, module)
        (copy / path.name).write_text(json.dumps(content), encoding="utf-8")
    # The bodies of compiled kernels run where Python cannot see them.
    (tree() / ".coveragerc").write_text("[run]\nomit = */_modidx.py\nparallel = true\npatch = subprocess\n"
        f"source = {tree()}/pytc\ndata_file = {tree()}/.coverage\n[report]\nexclude_also = @(\\w+\\.)?(n?jit|vectorize|guvectorize)\\b\n")
    is_slow = lambda path: any(directive("slow", cell) is not None for cell in code_cells(path))
    # Those of whole runs come last in the book, and take longest.
    longest_first = sorted(chapters()[::-1], key=is_slow, reverse=True)
    said = run_notebooks([copy / path.name for path in longest_first], flags="slow", under=("-m", "coverage", "run", f"--rcfile={tree()}/.coveragerc"))
    report = lambda *command: run(PYTHON, "-m", "coverage", *command, cwd=tree()).strip()
    report("combine", "-q")
    table, covered = report("report"), int(report("report", "--format=total"))
    if covered < COVERED: raise Failed(f"notebooks run {covered} % of pytc/, below {COVERED} %; add checks where most is missed\n{table}")
    return f"{said}, {covered} % of pytc/ run\n{table}"

def demo():
    "`pytc demo` goes from nothing to a score."
    with tempfile.TemporaryDirectory(prefix="pytc-demo-") as tmp: said = run(BIN / "pytc", "demo", cwd=tmp, minutes=30)
    return "\n".join(["it ends with", *said.splitlines()[-12:]])

def fib25():
    "Training on real tissue reaches the scores that the README promises."
    if not os.environ.get("PYTC_DATA"): return "skipped, PYTC_DATA is not set"
    with tempfile.TemporaryDirectory(prefix="pytc-fib25-") as tmp:
        run(BIN / "pytc", "train", "tutorials/fib25.yaml", "--run-dir", Path(tmp) / "run", cwd=ROOT, minutes=60)
        scores = json.loads((Path(tmp) / "run/scores.json").read_text(encoding="utf-8"))
        lacks = re.findall('<p class="missing">(.*?)</p>', (Path(tmp) / "run/report.html").read_text(encoding="utf-8"))
    refuse([f"report.html lacks a part: {why}" for why in lacks])
    table = [f"{name:14}" + ", ".join(f"{key} {row[key]:.3f}" for key in FIB25) for name, row in scores["rows"].items()]
    if not all(scores["test"][key] < bound for key, bound in FIB25.items()): refuse([f"this run does not score below {FIB25}", *table])
    return "\n".join([f"this run scores below {FIB25}", *table])

GATES = {"test": (clean, export, words, imports, notebooks, wheel), "check": (package, demo, fib25)}
COUNT = {True: 0, False: 0}  # gates and notebooks that passed, that failed

def main(suite="", *names):
    "Run a suite; each gate prints one line, and details below it where it has some."
    gates = [gate for gate in GATES.get(suite, ()) if gate.__name__ in names or not names]
    if not gates: sys.exit(f"gates.py {' '.join(sys.argv[1:])}: write one of {list(GATES)}, then nothing or names of its gates")
    for gate in gates:
        begun = time.time()
        try: mark, said = "ok  ", gate() or ""
        except Failed as failure: mark, said = "FAIL ", str(failure)
        except Exception: mark, said = "FAIL ", traceback.format_exc()  # a gate that breaks has not passed
        if said.startswith("skipped"): mark = "skip "
        else: COUNT[mark == "ok  "] += 1
        print(f"{mark}{gate.__name__} ({time.time() - begun:.0f} s): {said}".rstrip(": \n").replace("\n", "\n    "), flush=True)
    print(f"{COUNT[True]} passed, {COUNT[False]} failed")
    sys.exit(COUNT[False] > 0)

if __name__ == "__main__": (fork if sys.argv[1:2] == ["fork"] else main)(*sys.argv[1 + (sys.argv[1:2] == ["fork"]):])
