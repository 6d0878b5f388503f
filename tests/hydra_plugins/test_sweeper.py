from hydra_plugins.blocks_sweeper.sweeper import cells_of, narrowed

GRID = [
    {"method": ["method=topk", "method=batchtopk"], "k": ["k=8", "k=16"]},
    {"method": ["method=jumprelu"], "l0": ["l0=0.1"]},
]


def test_without_arguments_the_grid_does_not_change():
    assert narrowed(GRID, {}) == GRID


def test_a_value_of_the_grid_narrows_its_blocks_and_drops_other_blocks():
    assert narrowed(GRID, {"method": ["method=topk"]}) == [{"method": ["method=topk"], "k": ["k=8", "k=16"]}]


def test_a_value_that_no_block_has_replaces_the_axis_in_the_blocks_that_have_it():
    assert narrowed(GRID, {"k": ["k=4"]}) == [{"method": ["method=topk", "method=batchtopk"], "k": ["k=4"]}]


def test_no_given_value_is_lost_when_some_are_in_the_grid_and_some_are_not():
    assert [block["k"] for block in narrowed(GRID, {"k": ["k=8", "k=4"]})] == [["k=8", "k=4"]]


def test_a_setting_that_is_not_an_axis_is_added_to_every_block():
    assert all(block["seed"] == ["seed=1", "seed=2"] for block in narrowed(GRID, {"seed": ["seed=1", "seed=2"]}))


def test_blocks_without_the_narrowed_axis_are_dropped():
    assert narrowed(GRID, {"k": ["k=16"]}) == [{"method": ["method=topk", "method=batchtopk"], "k": ["k=16"]}]
    assert narrowed(GRID, {"method": ["method=jumprelu"], "k": ["k=16"]}) == []


BLOCKS = [{"method": "topk,batchtopk", "method.k": "8,16"}, {"method": "jumprelu", "seed": "0,1"}]


def cells(*arguments: str) -> set[str]:
    return {" ".join(sorted(cell)) for cell in cells_of(BLOCKS, arguments, alone=["method=read"])}


def test_an_assignment_that_fits_no_grid_runs_once_for_every_given_combination():
    assert cells("method=read") == {"method=read"}
    assert cells("method=read", "path=a,b", "seed=3") == {"method=read path=a seed=3", "method=read path=b seed=3"}


def test_an_assignment_that_fits_no_grid_runs_next_to_the_cells_of_the_grid():
    assert cells("method=read,jumprelu") == {"method=read", "method=jumprelu seed=0", "method=jumprelu seed=1"}


def test_such_an_assignment_is_an_ordinary_value_in_a_grid_that_names_it():
    blocks = [*BLOCKS, {"method": "read", "path": "a,b"}, {"method": "read", "path": "c"}]
    assert cells_of(blocks, ["method=read", "path=b"], alone=["method=read"]) == [["method=read", "path=b"]]
