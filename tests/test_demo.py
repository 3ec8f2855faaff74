"The demo's own commands, as they stand in the Makefile, run and save what they promise"
import json, re
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent

def demo(command, out, *more):
    "Run the Makefile's lines with `more` arguments for each of them; what they say"
    lines = re.search(r'^demo:.*\n((?:\t.*\n)+)', (root/'Makefile').read_text(), re.M)[1].splitlines()
    said = ''
    for line,args in zip([l for l in lines if '$(BIN)/' in l], more, strict=True):
        name,*given = line.strip().removeprefix('$(BIN)/').split()
        assert name=='swav'
        code,out_text,err = command(*(str(out) if o=='runs/demo' else o for o in given), *args)
        assert code==0, err
        said += out_text
    return said

def test_demo(tmp_path, command):
    said = demo(command, tmp_path/'demo', ['--epochs','1'], ['--epochs','3','--seeds','1'])
    assert 'swav.eps' in said and '| accuracy on 539 held-out images | 10 labels per class | all labels |' in said
    for row in ('k-NN, raw pixels','k-NN, untrained encoder','k-NN, pretrained encoder','trained from scratch'):
        assert f'| {row} | ' in said
    assert {o.name for o in (tmp_path/'demo').iterdir()}>={'encoder.safetensors','report.html','evaluation.json',
                                                           'history.csv','settings.json'}

@pytest.mark.slow
@pytest.mark.parametrize('seed', ['0','1'])
def test_pretraining_pays(tmp_path, command, seed):
    "Minutes: the pretrained encoder beats the untrained one and the pixels, whatever the seed"
    demo(command, tmp_path, ['--seed',seed], ['--epochs','0'])
    mean = {m: {o: v['mean'] for o,v in row.items()}
            for m,row in json.loads((tmp_path/'evaluation.json').read_text())['summary'].items()}
    pixels,untrained,pretrained = (mean[f'k-NN, {o}'] for o in ('raw pixels','untrained encoder','pretrained encoder'))
    assert pretrained['all']>untrained['all']+.02 and pretrained['all']>pixels['all']-.01
    assert pretrained['10']>untrained['10']+.1 and pretrained['10']>pixels['10']+.03
