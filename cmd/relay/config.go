package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

// Values of flags are parsed here and not by kong, which ends at the first mistake.

type duration struct {
	time.Duration
	raw string
	err error
}

func (d *duration) UnmarshalText(text []byte) error {
	d.raw = string(text)
	d.Duration, d.err = time.ParseDuration(d.raw)
	return nil
}

// What package relay allows.
const minTimeout, maxTimeout = 100 * time.Millisecond, 24 * time.Hour

// check returns a mistake unless the duration is between two others.
func (d duration) check(flag string, least, most time.Duration) error {
	if d.err != nil {
		return mistake(flag, "%s is no duration such as 15s", shown(d.raw))
	}
	if d.Duration < least || d.Duration > most {
		return mistake(flag, "%s is not between %s and %s", d.Duration, least, most)
	}
	return nil
}

// allowed is the duration, or 0, the default, in place of one that check has refused.
func (d duration) allowed() time.Duration {
	if d.Duration < minTimeout || d.Duration > maxTimeout {
		return 0
	}
	return d.Duration
}

type toggle struct {
	on  bool
	raw string // if it is neither true nor false
}

func (t *toggle) IsBool() bool { return true }

func (t *toggle) Decode(ctx *kong.DecodeContext) error {
	if ctx.Scan.Peek().Type != kong.FlagValueToken {
		t.on = true
		return nil
	}
	switch raw := fmt.Sprint(ctx.Scan.Pop().Value); strings.ToLower(raw) {
	case "true", "1", "yes", "on":
		t.on = true
	case "false", "0", "no", "off", "":
		t.on = false
	default:
		t.raw = raw
	}
	return nil
}

func (t *toggle) check(flag string) error {
	if t.raw != "" {
		return mistake(flag, "%s is neither true nor false", shown(t.raw))
	}
	return nil
}

const fileSuffix = "_FILE"

// secretVariables may each be replaced by one that ends in _FILE and names a file
// that holds the value.
var secretVariables = []string{"TXBOX_DATABASE_URL", "DATABASE_URL", "TXBOX_AMQP_URL", "AMQP_URL"}

// errNotSet is returned by secret.
var errNotSet = errors.New("not set")

// secret returns the flag's value, or the first variable or file that is set.
func secret(flag, value string, variables ...string) (string, error) {
	if value != "" {
		return value, nil
	}
	for _, name := range variables {
		value, path := os.Getenv(name), os.Getenv(name+fileSuffix)
		switch {
		case value != "" && path != "":
			return "", fmt.Errorf("--%s: $%s and $%s%s are both set", flag, name, name, fileSuffix)
		case value != "":
			return value, nil
		case path != "":
			value, err := readSecret(path)
			if err != nil {
				return "", fmt.Errorf("--%s: $%s%s: %w", flag, name, fileSuffix, err)
			}
			return value, nil
		}
	}
	return "", mistake(flag, "%w", errNotSet)
}

// readSecret does not name the file: the value may be the secret itself, under a
// variable whose name was taken for another's.
func readSecret(path string) (string, error) {
	content, err := os.ReadFile(path)
	if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) {
		return "", fmt.Errorf("read the file: %w", pathErr.Err)
	}
	value := strings.TrimSpace(string(content))
	if err == nil && value == "" {
		err = errors.New("the file is empty")
	}
	return value, err
}

var errMalformed = errors.New("malformed; want postgres://user:password@host:port/name, with @ : / ? # % in user and password percent-encoded")

// checkAt finds passwords that are not percent-encoded: all that end the host
// part too early leave an @ behind it, and a piece of the password in a place
// that is shown.
func checkAt(rawURL string) error {
	_, rest, found := strings.Cut(rawURL, "://")
	if !found {
		return nil
	}
	if end := strings.IndexAny(rest, "/?#"); end >= 0 && strings.Contains(rest[end:], "@") {
		return errMalformed
	}
	return nil
}
