"The demo's own commands, as they stand in the Makefile, run and save what they promise"
import csv, re, shlex, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
import demo as demo_tool
from self_supervised_swav.select import read_csv, read_labels

def demo(command, capsys, out, more={}):
    "Run the Makefile's lines, some with more arguments: what they say"
    lines = re.search(r'^demo:.*\n((?:\t.*\n)+)', (root/'Makefile').read_text(), re.M)[1].splitlines()
    said,unused = '',set(more)
    for line in [l for l in lines if '$(BIN)/' in l]:
        name,*args = shlex.split(line.strip().removeprefix('$(BIN)/'))
        args = [o.replace('runs/demo', str(out)) for o in args]
        key = args[1] if name=='python' else args[0]
        args += more.get(key, [])
        unused.discard(key)
        if name=='python':
            assert args.pop(0)=='tools/demo.py'
            demo_tool.main(args)
            said += capsys.readouterr().out
            continue
        assert name=='swav'
        code,out_text,err = command(*args)
        assert code==0, err
        said += out_text
    assert not unused
    return said

def percents(said): return {m[1]: float(m[2]) for m in re.finditer(r'^\| (.+?) \| \**([\d.]+)%', said, re.M)}

def test_demo(tmp_path, command, capsys):
    out = tmp_path/'demo'
    said = demo(command, capsys, out, dict(pretrain=['--epochs','1'], finetune=['--epochs','2','--folds','2'],
                                           score=['--draws','1','--epochs','2']))
    # the images that measure are no part of those that are learned and chosen from
    answers = read_labels(out/'answers.csv')[0]
    photos,held_out = ({o.name for o in (out/part).iterdir()} for part in ('photos','held_out'))
    assert len(photos)==1258 and len(held_out)==539 and not photos & held_out
    assert set(answers)=={f'photos/{o}' for o in photos} | {f'held_out/{o}' for o in held_out}
    labels = read_labels(out/'labels.csv')[0]
    assert len(labels)==50 and all(answers[f'photos/{k}']==v for k,v in labels.items())
    # the figure is that of the file of predictions
    rows = read_csv(out/'predictions.csv')
    right = sum(answers[f"held_out/{o['file']}"]==o['prediction'] for o in rows)
    assert {o['file'] for o in rows}==held_out
    shown = percents(said)
    assert shown['**selected labels, pretrained, `swav finetune`**']==round(100*right/539, 1)
    with open(out/'answers.csv', newline='') as f: digits = [o['class'] for o in csv.DictReader(f)
                                                             if o['file'].startswith('held_out')]
    assert shown['the commonest digit, always']==round(100*max(map(digits.count, digits))/539, 1)
    assert {'random labels, linear classifier on pixels','random labels, trained from scratch',
            'random labels, pretrained and fine-tuned'}<=set(shown)

@pytest.mark.slow
@pytest.mark.parametrize('seed', ['0','1'])
def test_pretraining_pays(tmp_path, command, capsys, seed):
    "Minutes: with the same number of labels the pretrained encoder beats training from scratch, whatever the seed"
    shown = percents(demo(command, capsys, tmp_path/'demo', dict(pretrain=['--seed',seed], score=['--draws','3'])))
    scratch = shown['random labels, trained from scratch']
    # the standard deviation of one accuracy of 539 images near 85 % is 1.5 points, that of a draw of labels 3 or less
    assert shown['random labels, pretrained and fine-tuned']>scratch+5
    assert shown['**selected labels, pretrained, `swav finetune`**']>scratch+5
