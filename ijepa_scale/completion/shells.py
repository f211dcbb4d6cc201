"""The scripts by which bash, zsh and fish complete `ijepa`.

They ask the command on the line if it is named without a folder or by an absolute path, and else the one on PATH.
"""

from __future__ import annotations

_BASH = r"""# Completes ijepa in bash.
_ijepa() {
    local program=${1/#\~/$HOME} current=${COMP_WORDS[COMP_CWORD]} kind= before= word= about= open=1
    [[ $program == /* || $program != */* ]] || program=ijepa # Tab runs nothing of an untrusted folder
    [[ $current =~ ^[=:]+$ ]] && current=
    COMPREPLY=()
    while IFS=$'\t' read -r word about; do
        if [[ -z $kind ]]; then
            kind=$word before=$about
        else
            COMPREPLY+=("$word")
        fi
    done < <("$program" completion --words bash "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    for word in "${COMPREPLY[@]}"; do
        [[ $word == *[=.] ]] || open=
    done
    if [[ $kind == files ]]; then
        while IFS= read -r word; do
            COMPREPLY+=("$before$word")
        done < <(compgen -f -- "${current#"$before"}")
        compopt -o filenames -o default 2>/dev/null
    elif [[ -n $open ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _ijepa ijepa
"""

_ZSH = r"""#compdef ijepa
# Completes ijepa in zsh.
_ijepa() {
    local program=${${(Q)words[1]}/#\~/$HOME} tab=$'\t' line word about
    local -a lines open ended
    [[ $program == /* || $program != */* ]] || program=ijepa # Tab runs nothing of an untrusted folder
    lines=("${(@f)$("$program" completion --words zsh "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    local kind=${lines[1]%%$tab*} before=${lines[1]#*$tab}
    for line in "${(@)lines[2,-1]}"; do
        word=${line%%$tab*} about=${line#*$tab}
        if [[ $word == *[=.] ]]; then
            open+=("${word//:/\\:}${about:+:$about}")
        else
            ended+=("${word//:/\\:}${about:+:$about}")
        fi
    done
    (( $#ended )) && _describe ijepa ended
    (( $#open )) && _describe ijepa open -S ''
    if [[ $kind == files ]]; then
        [[ -n $before ]] && compset -P "${(b)before}"
        _files
    fi
}
if [[ ${funcstack[1]} == _ijepa ]]; then
    _ijepa "$@"
else
    compdef _ijepa ijepa
fi
"""

_FISH = r"""# Completes ijepa in fish.
function __ijepa_complete
    set -l words (commandline -opc)
    set -l program (string replace -r '^~' $HOME -- $words[1])
    set -e words[1]
    if string match -q '*/*' -- $program; and not string match -q '/*' -- $program
        set program ijepa # Tab runs nothing of an untrusted folder
    end
    set -l current (commandline -ct)
    set -l lines ($program completion --words fish $words "$current" 2>/dev/null)
    set -l head (string split \t -- $lines[1])
    set -e lines[1]
    printf '%s\n' $lines
    if test "$head[1]" = files
        set -l rest (string sub -s (math (string length -- "$head[2]") + 1) -- "$current")
        for path in (__fish_complete_path "$rest")
            printf '%s%s\n' "$head[2]" $path
        end
    end
end
complete -c ijepa -f -a '(__ijepa_complete)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
