# Both `make demo` and `make test` make their own environment and fetch what they need; what is done is not done again.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= demo
DEMO_SEED ?= 0
DEMO_PAIRS ?= 6
# Of `make soak`: kills of the command; of the command with Dask workers, its own and a cluster's, each; of workers and schedulers under it; of a run of videos;
# faults of the Prefect server under runs of pairs and of videos, each.
KILLS ?= 50
DASK_KILLS ?= 12
WORKER_KILLS ?= 8
SCHEDULER_RESTARTS ?= 4
VIDEO_KILLS ?= 20
SERVER_FAULTS ?= 10
# Reports in a row on a busy machine.
EXITS ?= 200

.PHONY: demo test test-slow lint bench soak install weights clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "making the environment in $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed

weights: install
	@$(BIN)/e4s models pull

demo: weights
	@$(BIN)/e4s synth --pairs $(DEMO_PAIRS) --seed $(DEMO_SEED) --out $(DEMO)/people
	@$(BIN)/e4s pairs $(DEMO)/people --run $(DEMO)
	@echo "the same pairs once more, composited from the pictures instead of generated (shares all work before the swap)"
	@$(BIN)/e4s pairs $(DEMO)/people --run $(DEMO)/composite --store $(DEMO)/store --stage swap=composite
	@echo "open $(DEMO)/report/index.html and $(DEMO)/composite/report/index.html"

test: weights
	@$(BIN)/e4s models pull realesrgan_param realesrgan_bin dlib_face_id sface head_pose_6drepnet
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What takes minutes each: a scheduled report as its page is typed, the paper profile at 1024 px, soaks.
test-slow: test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: weights
	@for name in generator overhead region_conv recolor_memory evaluation video; do $(BIN)/python -m benchmarks.$$name || failed=1; done; test -z "$$failed"

soak: weights
	@$(BIN)/python -m benchmarks.soak --kills $(KILLS) || failed=1; \
	for where in local:2 outside; do $(BIN)/python -m benchmarks.soak --dask $$where --kills $(DASK_KILLS) || failed=1; done; \
	$(BIN)/python -m benchmarks.soak_cluster --kills $(WORKER_KILLS) --restarts $(SCHEDULER_RESTARTS) || failed=1; \
	$(BIN)/python -m benchmarks.soak_video --kills $(VIDEO_KILLS) || failed=1; \
	$(BIN)/python -m benchmarks.exits --exits $(EXITS) || failed=1; \
	$(BIN)/python -m benchmarks.soak_prefect --kills $(SERVER_FAULTS) || failed=1; test -z "$$failed"

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache
