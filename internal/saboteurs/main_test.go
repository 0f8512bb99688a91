package main

import "testing"

func TestSaboteursFitTheSource(t *testing.T) {
	t.Parallel()
	for _, s := range saboteurs {
		if _, err := s.edited("../.."); err != nil {
			t.Error(err)
		}
	}
}
