"`swav doctor`: what it prints where all is well, and where a step fails"
import pytest, torch
from self_supervised_swav import doctor

def test_where_all_is_well(command):
    state = torch.random.get_rng_state()
    code,said,err = command('doctor', '--device', 'cpu')
    found = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert code==0 and {'Python','torch','fastai','processor','device','bfloat16','torch.compile'} <= found.keys()
    assert found['training'].startswith('step') and 'works' in found['training'] and found['device']=='cpu'
    assert torch.equal(state, torch.random.get_rng_state())

def test_where_a_step_fails(command, monkeypatch):
    "The lines before it stand there, and one line says what failed"
    def broken(*args, **kwargs): raise TypeError('no such thing')
    monkeypatch.setattr(doctor, 'swav_learner', broken)
    code,said,err = command('doctor', '--device', 'cpu')
    assert code==2 and 'bfloat16' in said and 'training step' not in said
    assert err=='swav doctor: error: a training step on cpu failed with TypeError: no such thing\n'

def test_a_loss_that_is_not_finite(monkeypatch):
    monkeypatch.setattr(doctor, 'try_steps', lambda device: (float('nan'),1.))
    with pytest.raises(RuntimeError, match='a training step on cpu gave the loss nan'): list(doctor.examine('cpu'))

def test_no_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, 'which', lambda name: None)
    assert doctor.compiler_for('cpu')=='' and dict(doctor_lines(monkeypatch))['torch.compile']=='no compiler found'

def doctor_lines(monkeypatch):
    monkeypatch.setattr(doctor, 'try_steps', lambda device: (1.,1.))
    return doctor.examine('cpu')

def test_an_unknown_device(command):
    code,_,err = command('doctor', '--device', 'cuda:99')
    assert code==2 and 'device must be one of this machine' in err
