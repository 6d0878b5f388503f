from core.cells import MAX_NAME_BYTES, cell_name


def test_a_name_omits_keys_that_are_in_the_path_or_change_no_number():
    overrides = (
        "experiment=leask_batchtopk,logging.logger=none,method=topk,method.k=8,output_dir=/tmp/x,scale=smoke,seed=1,"
        "trainer.cell_processes=2,trainer.devices=2,trainer.processes=2"
    )
    assert cell_name(overrides) == "method=topk,method.k=8,seed=1,trainer.devices=2"


def test_a_cell_without_named_settings_is_called_base():
    assert cell_name("") == "base"
    assert cell_name("experiment=a,force=true") == "base"


def test_a_value_that_is_a_list_stays_with_its_key():
    assert cell_name("method.betas=[0.9,0.99],seed=1") == "method.betas=[0.9,0.99],seed=1"


def test_a_space_which_hydra_writes_with_a_backslash_becomes_an_underscore():
    assert cell_name(r"coder.name=TopK\ SAE,coder=sae") == "coder.name=TopK_SAE,coder=sae"


def test_long_names_are_cut_and_stay_distinct():
    a, b = (cell_name("model.source=" + "x" * 300 + end) for end in "ab")
    assert a != b
    assert len(a.encode()) < MAX_NAME_BYTES + 20
