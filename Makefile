# One environment for everything. Any torch from 2.4 on works: `make demo TORCH=torch` takes the newest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

.PHONY: demo flags test lint clean

demo: $(VENV)/demo
	$(VENV)/bin/python examples/demo/run_demo.py --output_dir demo-output

test: $(VENV)/test
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile tests

flags: $(VENV)/test
	$(VENV)/bin/python docs/flags_page.py

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/%: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) demo-output
