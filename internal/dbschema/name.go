// Package dbschema knows the database schema that holds txbox's tables: which names
// it may have and which versions of it this program works with.
package dbschema

import (
	"errors"
	"fmt"
	"strings"
)

// Default is the schema's name where the user gives none.
const Default = "txbox"

// maxBytes is PostgreSQL's NAMEDATALEN - 1: a longer name would silently be cut.
const maxBytes = 63

// Name returns name, or Default if it is empty. The error says what is
// wrong with a name that PostgreSQL would cut, reserve, or that reads like SQL.
func Name(name string) (string, error) {
	if name == "" {
		return Default, nil
	}
	if err := check(name); err != nil {
		return "", fmt.Errorf("schema %q: %w", name, err)
	}
	return name, nil
}

func check(name string) error {
	if len(name) > maxBytes {
		return fmt.Errorf("is %d bytes long, PostgreSQL keeps %d", len(name), maxBytes)
	}
	for i, c := range name {
		letter := c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if !letter && (i == 0 || c != '-' && (c < '0' || c > '9')) {
			return errors.New("may hold letters, digits, _ and -, and begins with a letter or _")
		}
	}
	if strings.HasPrefix(strings.ToLower(name), "pg_") || strings.EqualFold(name, "information_schema") {
		return errors.New("is reserved by PostgreSQL")
	}
	return nil
}
