#!/bin/sh
# wordcount FILE: writes how often each word occurs to /results/words.tsv, most frequent first, and sums to summary.txt.
# Runs inside the image nodeservice/wordcount, on busybox alone.
set -eu

input=$1
case $input in /*) ;; *) input=/data/licences/$input ;; esac
out=${2:-/results}

tr -cs 'A-Za-z' '\n' <"$input" | tr 'A-Z' 'a-z' | grep . | sort | uniq -c |
	awk '{ printf "%s\t%d\n", $2, $1 }' | sort -t "$(printf '\t')" -k2,2nr -k1,1 >"$out/words.tsv"

awk -v input="$input" '{ words += $2 } END { printf "input\t%s\nwords\t%d\ndistinct\t%d\n", input, words, NR }' \
	"$out/words.tsv" >"$out/summary.txt"
cat "$out/summary.txt"
head -n 5 "$out/words.tsv"
