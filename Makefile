# One environment for everything. `make demo TORCH=torch` takes the newest torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Tests that load no models, or tiny ones for a moment: under a minute on two idle cores.
FAST = tests/labelling/test_listing_and_export.py tests/labelling/test_votes.py tests/loss/test_loss.py \
	tests/pairs/test_bad_pair.py tests/pairs/test_dataset.py tests/pairs/test_decoding.py tests/pairs/test_pairs.py \
	tests/scoring/test_win_rate.py tests/single_file/test_upstream.py tests/store/test_listing.py \
	tests/store/test_order.py tests/test_config.py tests/test_rooms.py

.PHONY: campaigns clean demo flags lint test test-fast

demo: $(VENV)/demo
	$(VENV)/bin/python examples/demo/run_demo.py --output_dir demo-output

test: $(VENV)/test
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal tests

test-fast: $(VENV)/test
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal $(FAST)

# Minutes to hours, before a release: long tests, and faults by the hundred.
campaigns: $(VENV)/test
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m campaign tests
	$(VENV)/bin/python tests/faults/campaign.py kills=120 elastic=40 signals=40 disks=12 companions=1
	$(VENV)/bin/python tests/faults/fuzz.py --inputs 100000

flags: $(VENV)/test
	$(VENV)/bin/python docs/flags_page.py

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/%: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) demo-output
