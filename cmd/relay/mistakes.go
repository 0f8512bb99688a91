package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

// mistakes are what is wrong with flags and variables. They are collected, since
// an operator who is told of one at a time deploys as often as there are.
type mistakes []error

func (m *mistakes) add(err error) {
	if err != nil {
		*m = append(*m, err)
	}
}

// usageError is about what the caller wrote, not about what happened.
type usageError struct{ error }

// wrongUsage is nil if there are no mistakes.
func wrongUsage(found mistakes) error {
	if len(found) == 0 {
		return nil
	}
	return usageError{fmt.Errorf("wrong arguments or variables:\n%w", errors.Join(found...))}
}

// setting names a flag and the variable that stands for it.
func setting(flag string) string {
	variable := "TXBOX_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
	switch flag {
	case "database-url", "amqp-url":
		variable = strings.TrimPrefix(variable, "TXBOX_")
	case "timeout":
		variable = "TXBOX_STATUS_TIMEOUT"
	}
	return fmt.Sprintf("--%s ($%s)", flag, variable)
}

// mistake is about the value of a flag.
func mistake(flag, format string, args ...any) error {
	return fmt.Errorf("%s: %w", setting(flag), fmt.Errorf(format, args...))
}

// shown quotes a value, unless it may be a URL or DSN that was meant for another flag.
func shown(value string) string {
	if strings.ContainsAny(value, ":@/=") {
		return "the value"
	}
	return fmt.Sprintf("%q", value)
}

// withoutArguments hides what may be a URL in kong's error, which quotes
// arguments.
func withoutArguments(args []string, err error) error {
	text := err.Error()
	for _, arg := range args {
		if _, value, found := strings.Cut(arg, "="); found && strings.HasPrefix(arg, "-") {
			arg = value
		}
		if strings.ContainsAny(arg, ":@/=") {
			text = strings.ReplaceAll(text, arg, "...")
		}
	}
	return errors.New(text)
}

// unsetEmptyVariables makes NAME= the same as no NAME, as with DATABASE_URL:
// deployments hand on variables that nobody has set.
func unsetEmptyVariables(environ []string) {
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		if strings.HasPrefix(name, prefix) && value == "" {
			os.Unsetenv(name)
		}
	}
}

const prefix = "TXBOX_"

// unknownArguments returns args without the flags that do not exist and the
// arguments that nothing takes: kong would end at the first of them.
func unknownArguments(node *kong.Node, args []string) (known []string, found mistakes) {
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			return append(known, args[i:]...), found
		}
		name, _, assigned := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		var flag *kong.Flag
		switch {
		case strings.HasPrefix(arg, "-") && !strings.HasPrefix(arg, "--") && arg != "-h":
			found.add(fmt.Errorf("%s: there is no such flag", strings.Trim(shown(arg), `"`)))
			continue
		case !strings.HasPrefix(arg, "-") && len(node.Children) == 0 && len(node.Positional) == 0:
			found.add(fmt.Errorf("unexpected argument %s", strings.Trim(shown(arg), `"`)))
			continue
		case strings.HasPrefix(arg, "--"):
			if flag = findFlag(node, name); flag == nil {
				found.add(fmt.Errorf("--%s: there is no such flag", strings.Trim(shown(name), `"`)))
			}
		default:
			node = descend(node, arg)
		}
		if flag != nil || !strings.HasPrefix(arg, "--") {
			known = append(known, arg)
		}
		// What follows is its value.
		if strings.HasPrefix(arg, "--") && !assigned && (flag == nil || !flag.IsBool()) && i+1 < len(args) &&
			!strings.HasPrefix(args[i+1], "-") && descend(node, args[i+1]) == node {
			i++
			if flag != nil {
				known = append(known, args[i])
			}
		}
	}
	return known, found
}

// descend returns the command of that name in node, or node.
func descend(node *kong.Node, name string) *kong.Node {
	for _, child := range node.Children {
		if child.Name == name {
			return child
		}
	}
	return node
}

func findFlag(node *kong.Node, name string) *kong.Flag {
	for _, group := range node.AllFlags(false) {
		for _, flag := range group {
			if flag.Name == name {
				return flag
			}
		}
	}
	return nil
}

// unknownVariables finds the TXBOX_ variables that no flag has.
func unknownVariables(root *kong.Node, environ []string) (found mistakes) {
	known := map[string]bool{}
	for _, name := range secretVariables {
		known[name], known[name+fileSuffix] = true, true
	}
	nodes := []*kong.Node{root}
	for len(nodes) > 0 {
		node := nodes[0]
		nodes = append(nodes[1:], node.Children...)
		for _, flag := range node.Flags {
			for _, name := range flag.Envs {
				known[name] = true
			}
		}
	}
	kubernetes := slices.ContainsFunc(environ, func(v string) bool { return strings.HasPrefix(v, "KUBERNETES_SERVICE_HOST=") })
	for _, variable := range slices.Sorted(slices.Values(environ)) {
		name, _, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, prefix) || known[name] {
			continue
		}
		// Kubernetes tells each pod of each service: TXBOX_SERVICE_HOST, TXBOX_PORT_80_TCP.
		if kubernetes && (strings.Contains(name, "_SERVICE_") || strings.Contains(name, "_PORT")) {
			continue
		}
		found.add(fmt.Errorf("$%s: there is no such setting", name))
	}
	return found
}
