# What the package managers of a node say of the files that they brought: lines of a sum, two blanks and a path. $1 is the root of the
# system that is captured. Asked for only when a file looks like a private key.
root=${1%/}
if cd "$root/var/lib/dpkg/info" 2> /dev/null; then
    set -- *.md5sums
    [ ! -e "$1" ] || cat -- "$@"
fi
if command -v rpm > /dev/null 2>&1; then
    rpm --root "${root:-/}" -qa --qf '[%{FILEDIGESTS}  %{FILENAMES}\n]' 2> /dev/null || :
fi
