// Package failpoint marks the points at which a process may die, so that tests make it die
// there. In a normal build Hit is empty and costs nothing.
//
// A program that is built with -tags failpoint reads TXBOX_FAILPOINT, such as
//
//	TXBOX_FAILPOINT=relay/confirmed=kill@3
//
// and dies by SIGKILL the third time it comes to that point; panic and stop (SIGSTOP, which
// others end) are the other ways. The names are those of the actions of the model in
// internal/model.
package failpoint
