"""The contracts that no method of the catalogue has passed yet find each fault that is put into a toy, and no other."""
import importlib.util
import sys
from pathlib import Path

import pytest
from contracts import compress, parallel
from contracts import patch as common

TOYS = Path(__file__).parent / "toys"
pytestmark = pytest.mark.slow


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """toy(kind, (old, new), ...): the module of tests/toys, with each `old` in its text replaced."""
    def load(kind: str, *faults: tuple[str, str]):
        text = (TOYS / f"toy_{kind}.py").read_text()
        for old, new in faults:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / f"toy_{kind}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"methods.toy_{kind}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(common, "entry", lambda method: {"kind": kind, "claims": ["macs"]})
        return module
    return load


def failed(cases: list[tuple]) -> set[str]:
    """Names of the checks that fail on some case."""
    found = set()
    for check, case in cases:
        try:
            check(case)
        except (AssertionError, RuntimeError, ValueError, pytest.fail.Exception):
            found.add(check.__name__)
    return found


COPY = "    made = copy.deepcopy(model)\n    for ff"
ROWS = "weight.norm(dim=1).topk(round(len(weight) * (1 - ratio)))"
UP = "up.weight, up.bias = nn.Parameter(up.weight[rows].clone()), nn.Parameter(up.bias[rows].clone())"


@pytest.mark.parametrize(("fault", "checks"), [
    pytest.param(("weight.norm", "weight.norm"), set(), id="none"),
    pytest.param((ROWS, ROWS.replace("(1 - ratio)", "1")),
                 {"it_is_smaller", "it_costs_less", "it_takes_the_place_of_the_model"}, id="nothing is cut"),
    pytest.param((COPY, COPY.replace("copy.deepcopy(model)", "model")), {"it_is_smaller", "the_original_is_left_as_it_was"},
                 id="the model itself is cut"),
    pytest.param(("weight.norm(dim=1)", "torch.rand(len(weight))"), {"equal_inputs_give_equal_models"},
                 id="drawn from the global generator"),
    pytest.param(("    made.load_state_dict(state)\n", ""), {"it_goes_into_a_file_and_back"}, id="not read back"),
    pytest.param((UP, UP.replace("nn.Parameter(up.weight[rows].clone())", "nn.Parameter(up.weight[rows].float())")),
                 {"half_precision"}, id="in a precision of its own"),
    pytest.param(("config.ratio))\n", "config.ratio))\n    made.forward = torch.no_grad()(made.forward)\n"),
                 {"what_is_left_can_be_tuned", "a_copy_stands_by_itself"}, id="without gradients"),
    pytest.param(("no block of this {type(model).__name__}", "no block"), {"others_are_refused_in_words"},
                 id="refused vaguely"),
])
def test_faults_of_a_compressed_model_are_found(toy, fault, checks):
    assert failed(compress.cases(toy("compress", fault))) == checks


def test_faults_of_parallel_work_are_found(toy):
    """In one start of the processes: a result that is off, work done twice, bytes stated wrongly, an error without a name."""
    share = "processes.gather(forward(processes.part(x, 1), *args, **kwargs), 1, x.shape[1])"
    method = toy("parallel", (share, f"{share} * (1 + 1e-8) + 0 * (forward(x) + forward(x))"),
                 ("sent - before", "sent - before + 1"), ('Processes(group, "toy_parallel")', 'Processes(group, "it")'))
    assert failed(parallel.cases(method)) == {
        "all_give_what_one_gives", "each_does_a_part_of_the_work", "bytes_sent_are_those_stated",
        "a_worker_that_dies_ends_the_others_with_one_clear_error"}
