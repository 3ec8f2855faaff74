"The workflows and the forms for issues: what GitHub would refuse, as far as it can be seen from here"
import re
from pathlib import Path
import pytest, yaml

root = Path(__file__).resolve().parent.parent
workflows = sorted((root/'.github'/'workflows').glob('*.yml'))
forms = [p for p in sorted((root/'.github'/'ISSUE_TEMPLATE').glob('*.yml')) if p.stem!='config']
targets = set(re.findall(r'^([a-z-]+):', (root/'Makefile').read_text(encoding='utf-8'), re.M))

def read(path):
    "YAML 1.1 reads the key `on` as true"
    o = yaml.safe_load(path.read_text(encoding='utf-8'))
    return {'on' if k is True else k: v for k,v in o.items()}

# keys that GitHub documents: https://docs.github.com/actions/reference/workflows-and-actions/workflow-syntax
of_workflow = {'name','run-name','on','permissions','env','defaults','concurrency','jobs'}
of_job = {'name','permissions','needs','if','runs-on','environment','concurrency','outputs','env','defaults','steps',
          'timeout-minutes','strategy','continue-on-error','container','services','uses','with','secrets'}
of_step = {'id','if','name','uses','run','working-directory','shell','with','env','continue-on-error','timeout-minutes'}
events = {'push','pull_request','workflow_dispatch','schedule','release'}

def wrong_in_workflow(o):
    "What is wrong with a workflow, in words"
    wrong = [f'key {k}' for k in o.keys()-of_workflow] + [f'no {k}' for k in {'on','jobs'}-o.keys()]
    wrong += [f'event {k}' for k in set(o.get('on', {}))-events]
    for name,job in o.get('jobs', {}).items():
        wrong += [f'{name}: key {k}' for k in job.keys()-of_job]
        wrong += [f'{name}: no {k}' for k in {'runs-on','steps','timeout-minutes'}-job.keys()]
        needs = job.get('needs', [])
        wrong += [f'{name}: needs {k}' for k in ([needs] if isinstance(needs, str) else needs) if k not in o['jobs']]
        for i,step in enumerate(job.get('steps', [])):
            wrong += [f'{name} {i}: key {k}' for k in step.keys()-of_step]
            if ('uses' in step)==('run' in step): wrong.append(f'{name} {i}: one of uses and run')
            if not re.fullmatch(r'[\w-]+/[\w./-]+@[\w./-]+', step.get('uses', 'a/b@v1')):
                wrong.append(f"{name} {i}: uses {step['uses']}")
            # an expression in a script is a place to inject code: it belongs in env
            if '${{ github' in step.get('run', ''): wrong.append(f'{name} {i}: expression of an event in run')
            for made in re.findall(r'^make (.+)$', step.get('run', ''), re.M):
                for t in made.split():
                    wide = re.sub(r'\$\{\{.*?\}\}', '', made)==made
                    if wide and t not in targets: wrong.append(f'{name} {i}: make {t}')
        ids = {s.get('id') for s in job.get('steps', [])}
        used = set(re.findall(r'steps\.(\w+)\.', str(job)))
        wrong += [f'{name}: steps.{k}' for k in used-ids]
    return wrong

def test_there_are_all_three(): assert {'test','docs','release'} <= {p.stem for p in workflows}

@pytest.mark.parametrize('path', workflows, ids=lambda p: p.stem)
def test_workflow(path):
    o = read(path)
    assert wrong_in_workflow(o)==[]
    assert o['permissions']=={'contents': 'read'}, 'what is more stands in the job that needs it'

def test_what_is_wrong_is_found():
    bad = {'on': {'pushed': None}, 'jobs': {'a': {'runs-on': 'x', 'needs': 'b', 'steps': [
        {'uses': 'checkout', 'run': 'make nothing'}, {'run': 'echo ${{ github.event.title }}', 'iff': 1}]}}}
    assert len(wrong_in_workflow(bad))==8

def test_only_publishing_may_write():
    for path in workflows:
        for name,job in read(path)['jobs'].items():
            assert name=='publish' or 'permissions' not in job, (path.name, name)
    jobs = read(root/'.github'/'workflows'/'release.yml')['jobs']
    assert jobs['publish']['permissions']=={'id-token': 'write'} and jobs['publish']['needs']=='build'
    assert not any('password' in str(s) or 'secrets.' in str(s) for job in jobs.values() for s in job['steps'])

@pytest.mark.parametrize('path', forms, ids=lambda p: p.stem)
def test_form(path):
    "What GitHub calls the syntax for issue forms"
    o = read(path)
    assert o['name'] and o['description'] and o.keys() <= {'name','description','title','labels','assignees','body'}
    ids = [b['id'] for b in o['body']]
    assert len(ids)==len(set(ids))
    for b in o['body']:
        assert b['type'] in ('textarea','input','dropdown','checkboxes','markdown') and b['attributes']['label']
        assert b.keys() <= {'type','id','attributes','validations'}
    assert any('swav doctor' in b['attributes']['label'] for b in o['body'])
